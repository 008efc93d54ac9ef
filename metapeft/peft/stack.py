"""Adapters on top of each other: what was learned stays in force, frozen, while something new is trained.

Every stack has the same form, however many adapters went into it. Changes of linear layers add up: the sum of low-rank
changes is a LoRA whose rank is the sum of theirs. Trained virtual tokens that are frozen are keys and values, whatever
method made them. So there is at most one change of the linear layers and at most one set of virtual tokens, and a
stack of matrix methods alone is an ordinary LoRA, in every format and for every server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from metapeft.backbones.forward import Prefix as KeysValues
from metapeft.errors import Unfit, UserError
from metapeft.peft.adalora import TripletLowRank
from metapeft.peft.base import Adapter
from metapeft.peft.lora import LoRAConfig, LowRank, MatrixAdapter, low_rank
from metapeft.peft.matrices import Adapted, linear_layers, replace
from metapeft.peft.prefix import Prefix, PrefixConfig, flatten
from metapeft.peft.virtual import Table
from metapeft.runtime import mx, nn


class Stack(Adapter):
    """Changed linear layers and virtual tokens at once. Virtual tokens pass through the changed layers."""

    def __init__(self, matrices: MatrixAdapter, virtual: Adapter):
        self.matrices, self.virtual = matrices, virtual
        self.config = virtual.config
        self.module = nn.Module()
        self.module.matrices, self.module.virtual = matrices.module, virtual.module

    def attach(self, model: nn.Module) -> None:
        self.matrices.attach(model)
        self.virtual.attach(model)

    def detach(self, model: nn.Module) -> None:
        self.virtual.detach(model)
        self.matrices.detach(model)

    def prefix(self, model: nn.Module) -> KeysValues | None:
        return self.virtual.prefix(model)


def parts(adapter: Adapter | None) -> tuple[MatrixAdapter | None, Adapter | None]:
    """An adapter's changed linear layers and its virtual tokens."""
    if isinstance(adapter, Stack):
        return adapter.matrices, adapter.virtual
    return (adapter, None) if isinstance(adapter, MatrixAdapter) else (None, adapter)


def stacked(matrices: MatrixAdapter | None, virtual: Adapter | None) -> Adapter | None:
    """One adapter of both, where there are both."""
    return Stack(matrices, virtual) if matrices is not None and virtual is not None else matrices or virtual


def joined(below: Adapter | None, top: Adapter, model: nn.Module) -> Adapter:
    """What computes as `top` does on a model that has `below` beneath (`model`: without either).

    Raises UserError where both have virtual tokens: they would have to be trained together.
    """
    matrices, virtual = parts(below)
    mine, tokens = parts(top)
    if virtual is not None and tokens is not None:
        raise UserError("virtual tokens cannot lie on virtual tokens: start the new ones from the old ones")
    both = matrices if mine is None else mine if matrices is None else summed(matrices, mine)
    found = stacked(both, tokens or (as_prefix(below, model) if below is not None and virtual is not None else None))
    assert found is not None
    return found


def summed(below: MatrixAdapter, top: MatrixAdapter) -> MatrixAdapter:
    """Both changes of the linear layers as one LoRA; ranks that are out of force are left out."""
    pairs: dict[str, tuple[mx.array, mx.array]] = {}
    for adapter in (below, top):
        for path, delta in adapter.deltas.items():
            a, b = _factors(delta)
            known = pairs.get(path)
            both = known is not None
            pairs[path] = (mx.concatenate([known[0], a]), mx.concatenate([known[1], b], axis=1)) if both else (a, b)  # type: ignore[index]
    pairs = {path: pair for path, pair in pairs.items() if pair[0].shape[0]}
    mx.eval(pairs)
    ranks = {path: int(a.shape[0]) for path, (a, _) in pairs.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    own = {path: rank for path, rank in ranks.items() if rank != usual}
    alphas = {path: float(rank) for path, rank in own.items()}  # alpha = rank: the scale is 1 everywhere
    config = LoRAConfig(rank=usual, alpha=float(usual), rank_pattern=own, alpha_pattern=alphas)
    return MatrixAdapter(config, {path: low_rank(config, path, a, b) for path, (a, b) in pairs.items()})


def _factors(delta: nn.Module) -> tuple[mx.array, mx.array]:
    """A and the scaled B, without the ranks that AdaLoRA has taken out of force."""
    assert isinstance(delta, LowRank | TripletLowRank)
    if not isinstance(delta, TripletLowRank):
        return delta.a, delta.scale * delta.b
    kept = mx.array(np.flatnonzero(np.array(delta.e[:, 0])), dtype=mx.int32)
    return (delta.a * delta.e)[kept], (delta.scale * delta.b)[:, kept]


def as_prefix(adapter: Adapter, model: nn.Module) -> Prefix:
    """An adapter's virtual tokens as the keys and values they make now, in front of every layer: the same outputs.

    model: without the adapter. Raises UserError when the backbone's layers differ in their keys' shape.
    """
    adapter.attach(model)
    try:
        layers = adapter.prefix(model)
        mx.eval(layers)
    finally:
        adapter.detach(model)
    assert layers is not None, "only virtual tokens have keys and values"
    shapes = {(part.shape[1], part.shape[3]) for pair in layers for part in pair}
    if len(shapes) != 1:
        raise Unfit("prefix tuning needs keys and values of one shape in every layer; this backbone's differ")
    [(heads, head_width)] = shapes
    value = flatten(layers)
    mx.eval(value)
    config = PrefixConfig(tokens=value.shape[0], initialisation="random")
    return Prefix(config, Table(value), [heads] * len(layers), head_width)


@contextmanager
def beneath(model: nn.Module, adapter: Adapter) -> Iterator[KeysValues | None]:
    """While the block runs, `model` computes with `adapter` frozen in it; the block gets its keys and values, if any.

    Changes are merged into copies of the weights, so that what lies on top costs what it costs on the bare backbone;
    a quantized layer keeps its change beside it, which quantizing again would lose.
    """
    matrices, virtual = parts(adapter)
    prefix = None
    if virtual is not None:
        frozen = as_prefix(adapter, model)
        prefix = frozen.prefix(model)
        mx.eval(prefix)
    replaced: dict[str, nn.Module] = {}
    try:
        if matrices is not None:
            found = linear_layers(model)
            for path, delta in matrices.deltas.items():
                replaced[path] = found[path]
                replace(model, path, _changed(found[path], delta))
        model.freeze()
        yield prefix
    finally:
        for path, linear in replaced.items():
            replace(model, path, linear)


def _changed(linear: nn.Module, delta: nn.Module) -> nn.Module:
    if type(linear) is not nn.Linear:
        return Adapted(linear, delta)
    merged = nn.Linear(1, 1, bias="bias" in linear)
    merged.weight = linear.weight + delta.weight().astype(linear.weight.dtype)
    if "bias" in linear:
        merged.bias = linear.bias
    mx.eval(merged.parameters())
    return merged
