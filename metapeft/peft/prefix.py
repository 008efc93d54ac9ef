"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): trained keys and values in front of every layer's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from metapeft.backbones.forward import Gated, keys_values, precision
from metapeft.errors import Unfit
from metapeft.peft.base import Adapter, MethodConfig
from metapeft.peft.virtual import Table, repeat_to
from metapeft.runtime import mx, nn


@dataclass(frozen=True)
class PrefixConfig(MethodConfig):
    """`initialisation` "text" starts from the keys and values of a real text. `projection` > 0 trains through a
    Linear-Tanh-Linear of that hidden width instead of the keys and values themselves (then the start is random)."""

    method: ClassVar[str] = "prefix"
    tokens: int = 16
    initialisation: Literal["text", "random"] = "text"
    text: str = ""
    projection: int = 0


class Projection(nn.Module):
    """Embedding (tokens, width) -> Linear -> Tanh -> Linear -> (tokens, 2 * layers * kv_heads * head width)."""

    def __init__(self, tokens: int, width: int, hidden: int, outputs: int):
        super().__init__()
        self.embedding = mx.random.normal((tokens, width))
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, outputs)

    def __call__(self) -> mx.array:
        return self.second(mx.tanh(self.first(self.embedding)))


class Shots(Table):
    """Keys and values of training examples. `owners`: which example each token is of; tokens of those that are being
    learned from are left out (as long as others remain), or training would teach to copy them.
    """

    def __init__(self, value: mx.array, owners: Sequence[int]):
        super().__init__(value)
        self._owners = np.array(owners)
        self.left_out: frozenset[int] = frozenset()

    def __call__(self) -> mx.array:
        kept = np.flatnonzero(~np.isin(self._owners, list(self.left_out)))
        return self.value if len(kept) in (0, len(self._owners)) else self.value[mx.array(kept)]


class Prefix(Adapter):
    """`module()` gives (tokens, 2 * layers * kv_heads * head width): per layer the keys, then the values.

    weight: of its tokens in the softmax, in training behind a gate below 1; see `open_over`.
    """

    def __init__(self, config: PrefixConfig, module: nn.Module, kv_heads: Sequence[int], head_width: int):
        self.config = config
        self.module = module
        self.kv_heads, self.head_width = list(kv_heads), head_width
        self.weight, self._opening = 1.0, 0

    def open_over(self, steps: int) -> None:
        """Begins as an identity, behind a closed gate that opens evenly over so many steps: then it is a prefix like
        any other, without a trained gate (Zhang et al. 2023, arXiv:2303.16199) that adapters would be saved with."""
        self.weight, self._opening = 0.0, steps

    def before_step(self, step: int) -> None:
        if self._opening:
            self.weight = min(1.0, (step + 1) / self._opening)

    def attach(self, model: nn.Module) -> None:
        model.freeze()

    @contextmanager
    def learning_from(self, examples: Sequence[int]) -> Iterator[None]:
        if isinstance(self.module, Shots):
            self.module.left_out = frozenset(examples)
        try:
            yield
        finally:
            if isinstance(self.module, Shots):
                self.module.left_out = frozenset()

    def detach(self, model: nn.Module) -> None:
        pass

    def prefix(self, model: nn.Module) -> list[tuple[mx.array, mx.array]]:
        flat = self.module()
        tokens = flat.shape[0]
        heads = self.kv_heads[0]
        split = flat.reshape(tokens, 2 * len(self.kv_heads), heads, self.head_width).transpose(1, 2, 0, 3)
        layers = [(split[2 * i][None], split[2 * i + 1][None]) for i in range(len(self.kv_heads))]
        return layers if self.weight == 1.0 else Gated(layers, tokens, self.weight, precision(model))


def flatten(layers: Sequence[tuple[mx.array, mx.array]]) -> mx.array:
    """Per-layer (keys, values) of one sequence -> (tokens, 2 * layers * kv_heads * head width)."""
    stacked = mx.stack([part[0] for pair in layers for part in pair])  # (2 layers, kv_heads, tokens, head width)
    return stacked.transpose(2, 0, 1, 3).reshape(stacked.shape[2], -1).astype(mx.float32)


def one_shape(layers: list[tuple[mx.array, mx.array]]) -> tuple[int, int]:
    """Heads and head width of all keys and values. Raises Unfit where they differ (multi-head latent attention)."""
    shapes = {(part.shape[1], part.shape[3]) for pair in layers for part in pair}
    if len(shapes) != 1:
        raise Unfit("prefix tuning needs keys and values of one shape in every layer; this backbone's differ")
    return shapes.pop()


def create(config: PrefixConfig, model: nn.Module, seed: int, text_ids: Sequence[int], width: int) -> Prefix:
    """A fresh prefix. text_ids: what "text" starts from, cut or repeated."""
    real = keys_values(model, mx.array([repeat_to(text_ids, config.tokens)]))
    heads, head_width = one_shape(real)
    if config.projection:
        mx.random.seed(seed)
        module: nn.Module = Projection(config.tokens, width, config.projection, 2 * len(real) * heads * head_width)
    elif config.initialisation == "text":
        module = Table(flatten(real))
    else:
        value = flatten(real)
        module = Table(mx.std(value) * mx.random.normal(value.shape, key=mx.random.key(seed)))
    return Prefix(config, module, [heads] * len(real), head_width)
