"""A session: one backbone and one task, with everything that trials and evaluations can share."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metapeft.backbones.forward import Prefix, anatomy, caches, extended, run
from metapeft.data.task import Task
from metapeft.errors import Unfit
from metapeft.kernels.decoder import Decoder, decoder
from metapeft.peft.base import Adapter
from metapeft.peft.stack import beneath
from metapeft.runtime import mx, nn
from metapeft.training.encode import Encoded, encode_task, shared_beginning
from metapeft.training.trial import Score
from metapeft.training.trunk import Room, Trunk, pad
from metapeft.training.workers import workers

if TYPE_CHECKING:
    from metapeft.backbones import Backbone
    from metapeft.training.evaluation import Predictions

VIRTUAL = 512  # tokens that examples in the context may take
PASS_TOKENS = 48  # one more pass through the layers costs about as much as these tokens in a pass that is made anyway


@dataclass
class Shard:
    """Part of a batch. ids (batch, tokens), or hidden (batch, tokens, width) where the trunk is cached.

    rows: flat positions whose next token is a completion token; targets: those tokens; spans: how many per example.
    """

    ids: mx.array
    hidden: mx.array | None
    rows: mx.array
    targets: mx.array
    spans: list[int]


class Session:
    """Holds the encoded splits, the trunk's hidden states by depth, the workers and the untuned scores.

    like: a session on the same backbone, whose native view of it is used again; making and checking one takes seconds.
    """

    def __init__(self, backbone: Backbone, task: Task, like: Session | None = None):
        self.backbone, self.task = backbone, task
        self.model: nn.Module = backbone.model
        encoded = encode_task(task, backbone.tokenizer, backbone.context_length)
        # Every prompt of a task begins with the same instruction: attention is causal, so its hidden states are the
        # same for all examples, are computed once per step, and the examples keep only their own tokens.
        self.shared = shared_beginning([e for examples in encoded.values() for e in examples])
        self.encoded = {name: [e.without(len(self.shared)) for e in examples] for name, examples in encoded.items()}
        self.depth = anatomy(self.model).depth
        self.chance = math.log(backbone.tokenizer.vocab_size)  # loss of guessing every token, in nats
        self.workers = workers()
        self.untuned: dict[str, Score] = {}
        self.untuned_answers: dict[str, Predictions] = {}
        self.below: Prefix | None = None  # keys and values that are frozen beneath every adapter: see `over`
        self._room = Room()
        self._trunks: dict[tuple[str, int], Trunk] = {}
        # Models hold lazy constants (rotary frequencies): computed here, every thread may use them.
        mx.eval(run(self.model, mx.array([[0]])))
        longest = len(self.shared) + max(e.length for examples in self.encoded.values() for e in examples)
        # Where positions are a table (GPT-2's), virtual tokens take places in it.
        learned = getattr(anatomy(self.model).body, "wpe", None)
        self._most_virtual = None if learned is None else int(learned.weight.shape[0]) - longest
        same = like is not None and like.model is self.model
        self._view: Decoder | None = like._view if like is not None and same else decoder(self.model)
        view = self._view
        # How many virtual tokens every token sees; None: all. The decoder computes no sliding window.
        self.seen = None if view is None or view.window is None else view.window - longest
        # None where MLX computes: on a GPU, without a compiler, and for architectures that are not like Llama.
        self.decoder = view if self.seen is None or self.seen >= 0 else None

    @contextmanager
    def over(self, adapter: Adapter) -> Iterator[Session]:
        """A session on the backbone with `adapter` in force, frozen: its trials and scores are those on top of it.

        While the block runs, this session's own model is that one too. Raises UserError where it cannot be frozen.
        """
        with beneath(self.model, adapter) as prefix:
            upper = copy.copy(self)
            upper.below, upper._trunks, upper._room = prefix, {}, Room(self._room.left)
            upper.untuned, upper.untuned_answers = dict(self.untuned), dict(self.untuned_answers)
            yield upper

    def start(self, adapter: Adapter | None) -> int:
        """The layer below which nothing depends on what is trained and attached."""
        return 0 if adapter is None or self.below is not None else adapter.lowest_layer()

    def trunk(self, split: str, depth: int) -> Trunk:
        """The hidden states that enter layer `depth`; what a shallower trunk of the split knows is its start."""
        key = (split, depth)
        if key not in self._trunks:
            below = [t for (name, d), t in self._trunks.items() if name == split and d < depth]
            lower = max(below, key=lambda t: t.depth, default=None)
            examples = self.encoded[split]
            self._trunks[key] = Trunk(self.model, depth, examples, self.shared, self._room, lower, self.decoder)
        return self._trunks[key]

    def whole(self, examples: int) -> bool:
        """Whether so few sequences are computed faster with the shared beginning in each of them than apart from it."""
        return len(self.shared) * (examples - 1) < PASS_TOKENS

    def prefix(self, adapter: Adapter | None, start: int = 0, whole: bool = False) -> Prefix | None:
        """Keys and values that every example attends to: the adapter's virtual tokens, then the shared beginning.

        Layers below `start` are not run; theirs are placeholders of the right length. whole: the shared beginning is in
        the shards.
        """
        virtual = adapter.prefix(self.model) if adapter is not None else None
        if self.below is not None:
            assert virtual is None, "virtual tokens do not lie on virtual tokens (metapeft.peft.stack)"
            virtual = self.below
        most = self._most_virtual
        if most is not None and virtual is not None and virtual[0][0].shape[2] > most:
            raise Unfit(
                f"{virtual[0][0].shape[2]} virtual tokens and the longest row are more than the positions that the"
                f" backbone knows; take at most {max(0, most)}, or shorten the rows"
            )
        if whole or not self.shared:
            return virtual
        return extended(self.model, virtual, self.shared, start, self.beginning(start) if start > 0 else None)

    def shard(self, split: str, indices: Sequence[int], start: int, whole: bool = False) -> Shard:
        """Pads and places examples. With start > 0 the trunk below layer `start` must be prepared for them.

        whole: with the shared beginning before each.
        """
        examples = [self.encoded[split][i] for i in indices]
        longest = max(e.length for e in examples)
        hidden = self.trunk(split, start).stack(indices, longest) if start > 0 else None
        if whole and self.shared:
            examples = [e.behind(self.shared) for e in examples]
            longest += len(self.shared)
            if hidden is not None:
                beginning = self.beginning(start)
                beginning = mx.broadcast_to(beginning, (len(indices), *beginning.shape[1:]))
                hidden = mx.concatenate([beginning, hidden], axis=1)
        rows, targets, spans = rows_targets(examples, longest)
        ids = np.array([pad(e.ids[:-1], longest) for e in examples])
        return Shard(mx.array(ids), hidden, mx.array(rows), mx.array(targets), spans)

    def beginning(self, depth: int) -> mx.array:
        """The input of layer `depth` at the shared tokens, (1, tokens, width), from any trunk that knows it."""
        known = (trunk.beginning for (_, d), trunk in self._trunks.items() if d == depth)
        return next(found for found in known if found is not None)[1]


def rows_targets(examples: Sequence[Encoded], longest: int) -> tuple[list[int], list[int], list[int]]:
    rows: list[int] = []
    targets: list[int] = []
    spans: list[int] = []
    for position, example in enumerate(examples):
        rows += range(position * longest + example.start - 1, position * longest + example.length)
        targets += example.ids[example.start :]
        spans.append(len(example.ids) - example.start)
    return rows, targets, spans


def completion_logits(
    model: nn.Module, prefix: Prefix | None, shard: Shard, start: int, *, checkpoint: bool = False
) -> mx.array:
    """Logits at the completion positions of a shard, (positions, vocabulary). `prefix` comes before every sequence."""
    cache = None if prefix is None else caches(prefix)
    out = run(model, shard.ids, cache=cache, rows=shard.rows, start=start, hidden=shard.hidden, checkpoint=checkpoint)
    return out[0]
