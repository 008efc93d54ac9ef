"""Training and evaluation by the native decoder: from examples to its rows, and from its gradients to a method's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from metapeft.backbones.forward import Prefix
from metapeft.kernels.decoder import Decoder, Found, Gradients, Rows
from metapeft.peft.base import Adapter
from metapeft.peft.lora import MatrixAdapter
from metapeft.peft.prefix import Prefix as PrefixAdapter
from metapeft.peft.stack import Stack
from metapeft.peft.virtual import VirtualTokens
from metapeft.runtime import mx
from metapeft.training.vector import Layout

if TYPE_CHECKING:
    from metapeft.training.session import Session


def usable(session: Session, adapter: Adapter | None) -> Decoder | None:
    """The session's native decoder, if it computes the model with what is attached to it now."""
    view = session.decoder
    if view is None or not view.covers():
        return None
    below = 0 if session.below is None else session.below[0][0].shape[2]
    if session.seen is not None and below + getattr(getattr(adapter, "config", None), "tokens", 0) > session.seen:
        return None
    if adapter is None or isinstance(adapter, MatrixAdapter | PrefixAdapter | VirtualTokens | Stack):
        return view
    return None


def virtual_rows(adapter: Adapter | None) -> np.ndarray | None:
    """Embeddings of an adapter's virtual tokens as the layers see them, (tokens, width)."""
    if not isinstance(adapter, VirtualTokens):
        return None
    assert adapter._scale is not None, "attach comes before this"
    value = adapter.embeddings() / adapter._scale
    mx.eval(value)
    return np.array(value, dtype=np.float32)


def common_rows(session: Session, view: Decoder, virtual: np.ndarray | None, start: int) -> np.ndarray:
    """What all sequences begin with, at layer `start`: virtual tokens, then the shared beginning. May be empty."""
    shared = np.array(session.beginning(start)[0]) if start > 0 and session.shared else view.embed(session.shared)
    return shared if virtual is None else np.concatenate([virtual, shared])


def given_prefix(session: Session, adapter: Adapter | None) -> Prefix | None:
    """Keys and values that come before all tokens: those frozen beneath, or the adapter's own."""
    own = isinstance(adapter, PrefixAdapter | Stack)
    given = adapter.prefix(session.model) if own and adapter is not None else session.below
    if given is not None:
        mx.eval(given)
    return given


def known_prefix(session: Session, view: Decoder, adapter: Adapter | None, start: int) -> Prefix | None:
    """Keys and values that every example attends to, computed once (without gradients)."""
    given = given_prefix(session, adapter)
    rows = common_rows(session, view, virtual_rows(adapter), start)
    return view.record(Rows(rows, [len(rows)], prefix=given, start=start)) if len(rows) else given


def sequences(
    session: Session, view: Decoder, split: str, indices: Sequence[int], start: int
) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Each example's rows at layer `start`; the rows that predict completions, and what they should predict."""
    examples = [session.encoded[split][i] for i in indices]
    if start > 0:
        trunk = session.trunk(split, start)
        hidden = [np.asarray(trunk.get(i)) for i in indices]
    else:
        hidden = [view.embed(e.ids[:-1]) for e in examples]
    chosen: list[int] = []
    targets: list[int] = []
    end = 0
    for example in examples:
        chosen += range(end + example.start - 1, end + example.length)
        targets += example.ids[example.start :]
        end += example.length
    return hidden, chosen, targets


def predicted(
    session: Session,
    view: Decoder,
    prefix: Prefix | None,
    split: str,
    indices: Sequence[int],
    start: int,
    roots: Sequence[int],
) -> Callable[[], Found]:
    """When called: losses, hits and the roots' log-likelihoods at these examples' completion positions, in order."""
    hidden, chosen, targets = sequences(session, view, split, indices, start)
    rows = Rows(np.concatenate(hidden), np.cumsum([len(h) for h in hidden]).tolist(), prefix=prefix, start=start)
    return view.predict(rows, chosen, targets, roots)


class Loss:
    """The loss of shards of a batch and its gradient by an adapter's parameters, as one vector."""

    def __init__(self, session: Session, view: Decoder, adapter: Adapter, layout: Layout, start: int, checkpoint: bool):
        self.session, self.view, self.adapter, self.layout = session, view, adapter, layout
        self.start, self.checkpoint = start, checkpoint
        self.virtual: np.ndarray | None = None
        self.given: Prefix | None = None
        begins = [0, *layout.ends[:-1]]
        self.places = {name: slice(b, e) for name, b, e in zip(layout.names, begins, layout.ends, strict=True)}

    def jobs(self, shards: Sequence[Sequence[int]], total: int, seeds: Sequence[int]) -> list[Callable[[], Any]]:
        """One per shard, for `Workers.map`: (loss, gradient by what the method puts into the model)."""
        self.virtual = virtual_rows(self.adapter)
        self.given = given_prefix(self.session, self.adapter)
        return [partial(self._job, shard, total, seed) for shard, seed in zip(shards, seeds, strict=True)]

    def gradient(self, parameters: Any, found: Sequence[mx.array]) -> mx.array:
        """What the jobs found, added up, as the gradient by the parameters."""
        total: mx.array = sum(found[1:], found[0])
        if isinstance(self.adapter, MatrixAdapter):
            return total
        module = self.adapter.module

        def value(parameters: Any) -> mx.array:
            module.update(parameters)
            return mx.sum(module() * total.reshape(module().shape))

        tree = mx.grad(value)(parameters)
        module.update(parameters)
        return self.layout.join(tree)

    def _job(self, indices: Sequence[int], total: int, seed: int) -> Callable[[], tuple[mx.array, mx.array]]:
        hidden, chosen, targets = sequences(self.session, self.view, "train", indices, self.start)
        common = common_rows(self.session, self.view, self.virtual, self.start)
        if len(common):
            hidden = [common, *hidden]
        rows = Rows(
            np.concatenate(hidden),
            np.cumsum([len(h) for h in hidden]).tolist(),
            common=len(common),
            prefix=self.given,
            start=self.start,
        )
        gradients = Gradients({})
        vector = np.zeros(0, np.float32)
        if isinstance(self.adapter, MatrixAdapter):
            vector = np.zeros(self.layout.ends[-1], np.float32)
            for path, delta in self.adapter.deltas.items():
                stem = f"deltas.{path.replace('.', '/')}."
                gradients.deltas[id(delta)] = {p: vector[self.places[stem + p]] for p in "aeb" if p in delta}
        elif self.virtual is not None:
            gradients.hidden = np.zeros_like(rows.hidden)
        else:
            assert self.given is not None
            gradients.prefix = [(np.zeros(k.shape, np.float32), np.zeros(v.shape, np.float32)) for k, v in self.given]
        chosen = [len(common) + row for row in chosen]
        call = self.view.loss_and_gradients(
            rows, chosen, targets, 1 / total, gradients, seed=seed, checkpoint=self.checkpoint
        )
        return partial(self._run, call, gradients, vector)

    def _run(self, call: Callable[[], float], gradients: Gradients, vector: np.ndarray) -> tuple[mx.array, mx.array]:
        loss = call()
        if gradients.hidden is not None:
            assert isinstance(self.adapter, VirtualTokens) and self.virtual is not None
            assert self.adapter._scale is not None
            vector = gradients.hidden[: len(self.virtual)] / self.adapter._scale
        elif gradients.prefix is not None:
            # Per layer (1, heads, tokens, head width) -> the method's (tokens, 2 * layers * heads * head width).
            stacked = np.stack([part[0] for pair in gradients.prefix for part in pair])
            vector = stacked.transpose(2, 0, 1, 3)
        return mx.array(loss), mx.array(np.ascontiguousarray(vector).reshape(-1))
