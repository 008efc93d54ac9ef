"""LoRA (Hu et al. 2021, arXiv:2106.09685), with rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from metapeft.peft.base import Adapter, MethodConfig
from metapeft.peft.matrices import Adapted, adaptable, layer_index, linear_layers, merge_into, replace, shape
from metapeft.runtime import mx, nn


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """`targets` names linear layers (empty: all of them), `layers` counts the top layers adapted (0: all).

    `rank_pattern` and `alpha_pattern` give single layers, by path ending, another rank or alpha.
    """

    method: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    layers: int = 0
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


class LowRank(nn.Module):
    """x -> scale * (x A^T) B^T with A (rank, inputs) and B (outputs, rank)."""

    def __init__(self, a: mx.array, b: mx.array, scale: float, dropout: float):
        super().__init__()
        self.a, self.b = a, b
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array) -> mx.array:
        return (self.dropout(x).astype(self.a.dtype) @ self.a.T) @ (self.scale * self.b).T

    def weight(self) -> mx.array:
        return self.scale * (self.b @ self.a)


class MatrixAdapter(Adapter):
    """Trained changes to linear layers: `deltas` maps each path to a module that computes the change."""

    def __init__(self, config: MethodConfig, deltas: dict[str, nn.Module]):
        self.config = config
        self.deltas = deltas
        self.module = nn.Module()
        self.module.deltas = {path.replace(".", "/"): delta for path, delta in deltas.items()}
        self.module.eval()  # dropout is for the trainer's steps alone
        self._replaced: dict[str, nn.Module] = {}

    def attach(self, model: nn.Module) -> None:
        model.freeze()
        found = linear_layers(model)
        for path, delta in self.deltas.items():
            self._replaced[path] = found[path]
            replace(model, path, Adapted(found[path], delta))

    def detach(self, model: nn.Module) -> None:
        for path, linear in self._replaced.items():
            replace(model, path, linear)
        self._replaced.clear()

    def lowest_layer(self) -> int:
        return min(layer_index(path) for path in self.deltas)

    def merge(self, model: nn.Module) -> None:
        found = linear_layers(model)
        for path, delta in self.deltas.items():
            replace(model, path, merge_into(found[path], delta.weight()))
        self._replaced.clear()


def pattern(values: dict[str, Any], path: str, default: Any) -> Any:
    """The value whose key is the longest ending of `path`, else the default (as Hugging Face PEFT's rank_pattern)."""
    hits = [key for key in values if path == key or path.endswith(f".{key}")]
    return values[max(hits, key=len)] if hits else default


def create(config: LoRAConfig, model: nn.Module, seed: int) -> MatrixAdapter:
    """A fresh LoRA: A uniform in +-1/sqrt(inputs) (Kaiming, a = sqrt 5), B zero, so the model's output is unchanged."""
    keys = iter(mx.random.split(mx.random.key(seed), 4096))
    deltas: dict[str, nn.Module] = {}
    for path, linear in adaptable(model, config.targets, config.layers).items():
        outputs, inputs = shape(linear)
        rank = pattern(config.rank_pattern, path, config.rank)
        bound = 1 / math.sqrt(inputs)
        a = mx.random.uniform(-bound, bound, (rank, inputs), key=next(keys))
        deltas[path] = low_rank(config, path, a, mx.zeros((outputs, rank)))
    return MatrixAdapter(config, deltas)


def low_rank(config: LoRAConfig, path: str, a: mx.array, b: mx.array) -> LowRank:
    alpha = pattern(config.alpha_pattern, path, config.alpha)
    rank = a.shape[0]
    return LowRank(a, b, alpha / math.sqrt(rank) if config.rslora else alpha / rank, config.dropout)


def tensors(adapter: MatrixAdapter) -> dict[str, mx.array]:
    """Weights under Hugging Face PEFT's names."""
    result = {}
    for path, delta in adapter.deltas.items():
        result[f"base_model.model.{path}.lora_A.weight"] = delta.a
        result[f"base_model.model.{path}.lora_B.weight"] = delta.b
    return result


def from_tensors(config: LoRAConfig, weights: dict[str, mx.array]) -> MatrixAdapter:
    """The adapter that `tensors` came from."""
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    deltas: dict[str, nn.Module] = {}
    for name, a in weights.items():
        if name.endswith(suffix):
            path = name[len(prefix) : -len(suffix)]
            deltas[path] = low_rank(config, path, a, weights[f"{prefix}{path}.lora_B.weight"])
    return MatrixAdapter(config, deltas)
