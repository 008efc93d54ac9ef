"""The untuned backbone with examples in its context (Brown et al. 2020, arXiv:2005.14165), kept as a prefix.

The keys and values of the examples' tokens are all that later tokens see of them, so they make an ordinary adapter:
prefix tuning that was never trained computes exactly what the examples in front of the prompt would. Such a prefix can
be trained further; each step then leaves out the tokens of the examples that it learns from (Lu et al. 2025,
arXiv:2507.04221).
"""

from __future__ import annotations

from collections.abc import Sequence

from metapeft.backbones.forward import keys_values
from metapeft.peft.prefix import Prefix, PrefixConfig, flatten
from metapeft.peft.virtual import Table
from metapeft.runtime import mx
from metapeft.training.session import VIRTUAL, Session


def demonstrations(session: Session, budget: int = VIRTUAL) -> list[int]:
    """The tokens of `shown` examples, one after another."""
    return [token for _, tokens in shown(session, budget) for token in tokens]


def shown(session: Session, budget: int = VIRTUAL) -> list[tuple[int, list[int]]]:
    """As many training examples as fit into `budget` and the backbone's context, as (number, tokens): prompt,
    completion, end of sequence and a new line; the first one comes last, next to the question. A long one (over a
    quarter of the room) that does not fit beside those before it is passed over; there may be none.

    The end of sequence shows where an answer ends; the new line after it is worth some 20 points of exact match.
    """
    line = list(session.backbone.tokenizer.encode("\n", add_special_tokens=False))
    longest = max(len(e.ids) for examples in session.encoded.values() for e in examples) + len(session.shared)
    room = min(budget, VIRTUAL, session.backbone.context_length - longest)
    taken: list[tuple[int, list[int]]] = []
    for number, example in enumerate(session.encoded["train"]):
        tokens = [*session.shared, *example.ids, *line]
        if sum(len(each) for _, each in taken) + len(tokens) > room:
            if 4 * len(tokens) > room:
                continue
            break
        taken.append((number, tokens))
    return taken[::-1]


def owners(session: Session) -> list[int]:
    """For every token of the `demonstrations`, which training example it is of."""
    return [number for number, tokens in shown(session) for _ in tokens]


def prefix(session: Session, tokens: Sequence[int]) -> Prefix:
    """An adapter, not attached, that puts these tokens before everything. There must be at least one."""
    layers = keys_values(session.model, mx.array([list(tokens)]))
    heads, head_width = layers[0][0].shape[1], layers[0][0].shape[3]
    table = flatten(layers)
    mx.eval(table)
    return Prefix(PrefixConfig(tokens=len(tokens)), Table(table), [heads] * len(layers), head_width)
