"""A session: one backbone and one task, with everything that trials and evaluations can share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metapeft import blas
from metapeft.backbones.forward import Prefix, PrefixCache, anatomy, extended, run
from metapeft.data.task import Task
from metapeft.peft.base import Adapter
from metapeft.runtime import device, mx, nn
from metapeft.training.encode import Encoded, encode_task, shared_beginning
from metapeft.training.trial import Score
from metapeft.training.trunk import Trunk, pad

if TYPE_CHECKING:
    from metapeft.backbones import Backbone


@dataclass
class Shard:
    """Part of a batch, on one stream. ids (batch, tokens), or hidden (batch, tokens, width) where the trunk is cached.

    rows: flat positions whose next token is a completion token; targets: those tokens; spans: how many per example.
    """

    ids: mx.array
    hidden: mx.array | None
    rows: mx.array
    targets: mx.array
    spans: list[int]
    stream: mx.Stream


class Session:
    """Holds the encoded splits, the trunk's hidden states by depth, the streams and the untuned scores."""

    def __init__(self, backbone: Backbone, task: Task):
        self.backbone, self.task = backbone, task
        self.model: nn.Module = backbone.model
        encoded = encode_task(task, backbone.tokenizer, backbone.context_length)
        # Every prompt of a task begins with the same instruction: attention is causal, so its hidden states are the same
        # for all examples, are computed once per step, and the examples keep only their own tokens.
        self.shared = shared_beginning([e for examples in encoded.values() for e in examples])
        self.encoded = {name: [e.without(len(self.shared)) for e in examples] for name, examples in encoded.items()}
        self.depth = anatomy(self.model).depth
        self.streams = streams()
        self.untuned: dict[str, Score] = {}
        self._trunks: dict[tuple[str, int], Trunk] = {}

    def trunk(self, split: str, depth: int) -> Trunk:
        key = (split, depth)
        if key not in self._trunks:
            self._trunks[key] = Trunk(self.model, depth, self.encoded[split], self.shared)
        return self._trunks[key]

    def prefix(self, adapter: Adapter | None, start: int = 0) -> Prefix | None:
        """Keys and values that every example attends to: the adapter's virtual tokens, then the shared beginning.

        Layers below `start` are not run; theirs are placeholders of the right length.
        """
        virtual = adapter.prefix(self.model) if adapter is not None else None
        if not self.shared:
            return virtual
        hidden = None if start == 0 else self.trunk("train", start).beginning()
        return extended(self.model, virtual, self.shared, start, hidden)

    def shard(self, split: str, indices: Sequence[int], start: int, stream: mx.Stream) -> Shard:
        """Pads and places examples. With start > 0 the trunk below layer `start` must be prepared for them."""
        examples = [self.encoded[split][i] for i in indices]
        longest = max(e.length for e in examples)
        rows, targets, spans = rows_targets(examples, longest)
        hidden = None
        if start > 0:
            trunk = self.trunk(split, start)
            with mx.stream(stream):
                states = [trunk.get(i) for i in indices]
                hidden = mx.stack([mx.pad(h, ((0, longest - h.shape[0]), (0, 0))) for h in states])
        ids = np.array([pad(e.ids[:-1], longest) for e in examples])
        return Shard(mx.array(ids), hidden, mx.array(rows), mx.array(targets), spans, stream)


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
    """Logits at the completion positions of a shard, (positions, vocabulary). `prefix` comes first in every sequence."""
    cache = None if prefix is None else [PrefixCache(k, v) for k, v in prefix]
    out = run(
        model, shard.ids, cache=cache, rows=shard.rows, start=start, hidden=shard.hidden, checkpoint=checkpoint
    )
    return out[0]


def streams() -> list[mx.Stream]:
    """On a CPU one stream per core, each with single-threaded BLAS: MLX's elementwise work has one thread per stream."""
    if device() != "cpu":
        return [mx.default_stream(mx.default_device())]
    count = min(blas.usable_cores(), 8)
    blas.set_threads(1)
    return [mx.new_stream(mx.cpu) for _ in range(count)]
