"""One forward pass for a batch whose rows have different adapters.

Low-rank matrices of all adapters in use are stacked: x A^T for all of them at once, then every row keeps the columns of
its own adapter, then B. That is two thin products per linear layer however many adapters a batch mixes. A batch with
one adapter uses that one's matrices as they are, one with none the backbone alone. Virtual tokens are keys and values:
they go into each row's cache (`metapeft.serving.generate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metapeft.errors import UserError
from metapeft.peft import adapters, checkpoints
from metapeft.peft.adalora import TripletLowRank
from metapeft.peft.lora import LowRank
from metapeft.peft.matrices import Adapted, linear_layers, replace
from metapeft.peft.stack import parts
from metapeft.runtime import mx, nn

Pair = tuple[mx.array, mx.array]


@dataclass(eq=False)
class Resident:
    """An adapter in memory. matrices: path -> (A, B), (rank, inputs) and (rank, outputs), B scaled; or a prefix."""

    name: str
    method: str
    matrices: dict[str, Pair] = field(default_factory=dict)
    prefix: list[Pair] | None = None  # per layer (keys, values), each (1, kv_heads, virtual tokens, head width)

    @property
    def bytes(self) -> int:
        pairs = [*self.matrices.values(), *(self.prefix or ())]
        return sum(part.nbytes for pair in pairs for part in pair)

    @property
    def tokens(self) -> int:
        """Virtual tokens in front of every sequence."""
        return int(self.prefix[0][0].shape[2]) if self.prefix else 0


def read(folder: Path, model: nn.Module, name: str) -> Resident:
    """The adapter in a folder, checked against its manifest and computed. `model` may be mixed, no rows chosen.

    Raises UserError when the folder is damaged or was made for another backbone.
    """
    saved = checkpoints.read(folder)
    adapter = adapters.build(saved, model, name)
    found = Resident(name, saved.config.method)
    matrices, virtual = parts(adapter)
    if matrices is not None:
        found.matrices = {path: _factors(delta) for path, delta in matrices.deltas.items()}
    if virtual is not None:
        adapter.attach(model)
        found.prefix = adapter.prefix(model)
        adapter.detach(model)
    arrays = [part for pair in (*found.matrices.values(), *(found.prefix or ())) for part in pair]
    mx.eval(arrays)
    if not all(bool(mx.all(mx.isfinite(part))) for part in arrays):
        raise UserError(f"{name} holds numbers that are not finite; train it again")
    return found


def _factors(delta: nn.Module) -> Pair:
    assert isinstance(delta, LowRank | TripletLowRank)
    a = delta.a * delta.e if isinstance(delta, TripletLowRank) else delta.a
    return a, mx.contiguous((delta.scale * delta.b).T)


MOST_STACKED = 16  # adapters whose columns a mixed batch computes, whether its rows use them or not


class Mixture:
    """Makes a model's linear layers choose an adapter per row. One thread at a time computes with the model."""

    def __init__(self, model: nn.Module):
        self.slots: dict[Resident, int] = {}  # what is stacked, and where
        self.everyone: Resident | None = None  # the adapter that all rows have
        self.places: mx.array | None = None  # (rows,): the slot of each row's adapter, when they differ
        self.masks: dict[tuple[int, ...], mx.array] = {}
        self.layers: dict[str, Layer] = {}
        for path, linear in linear_layers(model).items():
            self.layers[path] = Layer(linear, self, path)
            replace(model, path, self.layers[path])

    @contextmanager
    def rows(self, residents: Sequence[Resident | None]) -> Iterator[None]:
        """While the block builds graphs, row i of every batch has the i-th adapter (None: the backbone alone)."""
        wanted = [r if r is not None and r.matrices else None for r in residents]
        distinct = set(wanted)
        if len(distinct) == 1:
            self.everyone = wanted[0]
        else:
            self._stack({r for r in distinct if r is not None})
            nobody = len(self.slots)
            self.places = mx.array([nobody if r is None else self.slots[r] for r in wanted])
        try:
            yield
        finally:
            self.everyone = self.places = None
            self.masks = {}

    def forget(self, resident: Resident) -> None:
        """Frees the stack if it holds this adapter."""
        if resident in self.slots:
            self.slots = {}
            for layer in self.layers.values():
                layer.stack([])

    def mask(self, ranks: tuple[int, ...]) -> mx.array:
        """(rows, 1, all ranks): 1 where a column belongs to the row's adapter. ranks: of each slot in this layer."""
        if ranks not in self.masks:
            assert self.places is not None
            owners = mx.array([slot for slot, rank in enumerate(ranks) for _ in range(rank)])
            self.masks[ranks] = (self.places[:, None] == owners[None]).astype(mx.float32)[:, None, :]
        return self.masks[ranks]

    def _stack(self, needed: set[Resident]) -> None:
        """What earlier batches stacked stays, so that adapters which take turns are not copied again and again."""
        if needed <= self.slots.keys():
            return
        kept = list(self.slots) if len(self.slots.keys() | needed) <= MOST_STACKED else []
        self.slots = {resident: slot for slot, resident in enumerate(dict.fromkeys([*kept, *needed]))}
        for path, layer in self.layers.items():
            layer.stack([resident.matrices.get(path) for resident in self.slots])
        mx.eval([layer.stacked for layer in self.layers.values() if layer.stacked])


class Layer(Adapted):
    """A linear layer, plus the change that each row's adapter makes."""

    def __init__(self, base: nn.Module, mixture: Mixture, path: str):
        super().__init__(base, nn.Identity())
        self._no_parameters(mixture=mixture, path=path, stacked=None, ranks=())

    def stack(self, pairs: Sequence[Pair | None]) -> None:
        """Matrices of all slots, one below the other; None: that adapter leaves this layer as it is."""
        present = [pair for pair in pairs if pair is not None]
        stacked = tuple(mx.concatenate(list(parts)) for parts in zip(*present, strict=True)) if present else None
        ranks = tuple(0 if pair is None else int(pair[0].shape[0]) for pair in pairs)
        self._no_parameters(stacked=stacked, ranks=ranks)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        pair, mask = self.stacked, None
        if self.mixture.places is None:
            everyone = self.mixture.everyone
            pair = None if everyone is None else everyone.matrices.get(self.path)
        elif pair is not None:
            mask = self.mixture.mask(self.ranks)
        if pair is None:
            return y
        low = x.astype(pair[0].dtype) @ pair[0].T
        if mask is not None:
            low = low * mask
        return y + (low @ pair[1]).astype(y.dtype)

    def _no_parameters(self, **values: Any) -> None:
        """Attributes that are none of the model's."""
        for name, value in values.items():
            object.__setattr__(self, name, value)
