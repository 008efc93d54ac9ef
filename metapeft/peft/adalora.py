"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): low rank in SVD form, the rank budget moved to where it matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from metapeft.peft.base import MethodConfig
from metapeft.peft.lora import MatrixAdapter
from metapeft.peft.matrices import adaptable, shape
from metapeft.runtime import mx, nn


@dataclass(frozen=True)
class AdaLoRAConfig(MethodConfig):
    """Ranks start at `initial_rank` per layer and fall to `target_rank` on average.

    The budget stays for the first `initial_fraction` of the steps, falls cubically, and is final for the last
    `final_fraction`; it is re-allocated every `interval` steps.
    """

    method: ClassVar[str] = "adalora"
    initial_rank: int = 12
    target_rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    layers: int = 0
    beta1: float = 0.85
    beta2: float = 0.85
    initial_fraction: float = 0.1
    final_fraction: float = 0.3
    interval: int = 1
    orthogonality: float = 0.5


class TripletLowRank(nn.Module):
    """x -> scale * (x (A E)^T) B^T with A (rank, inputs), E (rank, 1), B (outputs, rank)."""

    def __init__(self, a: mx.array, e: mx.array, b: mx.array, scale: float, dropout: float):
        super().__init__()
        self.a, self.e, self.b = a, e, b
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array) -> mx.array:
        return (self.dropout(x).astype(self.a.dtype) @ (self.a * self.e).T) @ (self.scale * self.b).T

    def weight(self) -> mx.array:
        return self.scale * (self.b @ (self.a * self.e))


class AdaLoRA(MatrixAdapter):
    """Follows Hugging Face PEFT's RankAllocator; `schedule` must be called with the number of steps before training."""

    config: AdaLoRAConfig

    def __init__(self, config: AdaLoRAConfig, deltas: dict[str, nn.Module]):
        super().__init__(config, deltas)
        self.initial_budget = sum(int(d.e.size) for d in deltas.values())
        self.target_budget = config.target_rank * len(deltas)
        self.total_steps = self.initial_steps = self.final_steps = 0
        self.average: mx.array | None = None  # smoothed importance of every parameter, as one vector
        self.uncertainty: mx.array | None = None
        self.kept: dict[str, mx.array] | None = None  # path -> which ranks are in force, (rank, 1) bool

    def schedule(self, total: int, initial: int | None = None, final: int | None = None) -> None:
        self.total_steps = total
        self.initial_steps = round(self.config.initial_fraction * total) if initial is None else initial
        self.final_steps = round(self.config.final_fraction * total) if final is None else final

    def extra_loss(self) -> mx.array:
        """orthogonality * mean over all A and B of ||P P^T - I|| (Frobenius, not squared)."""
        grams: dict[int, list[mx.array]] = {}  # by rank: matrices of one size are compared at once
        for delta in self.deltas.values():
            for gram in (delta.a @ delta.a.T, delta.b.T @ delta.b):
                grams.setdefault(gram.shape[0], []).append(gram)
        norms = []
        for rank, found in grams.items():
            difference = mx.stack(found) - mx.eye(rank)
            # Where the difference is exactly zero the norm has no gradient; the offset keeps it finite.
            norms.append(mx.sqrt(mx.sum(difference * difference, axis=(1, 2)) + 1e-20))
        return self.config.orthogonality * mx.mean(mx.concatenate(norms))

    def budget(self, step: int) -> tuple[int, bool]:
        """(total rank allowed at `step`, whether it is re-allocated there)."""
        fall = self.total_steps - self.final_steps - self.initial_steps
        if step <= self.initial_steps:
            return self.initial_budget, False
        if step > self.total_steps - self.final_steps:
            return self.target_budget, True
        remaining = 1 - (step - self.initial_steps) / fall
        budget = int((self.initial_budget - self.target_budget) * remaining**3 + self.target_budget)
        return budget, step % self.config.interval == 0

    def after_step(self, step: int, gradients: dict[str, Any]) -> None:
        """`gradients` has, for each path, a dict with the gradients of a, e and b (the values the optimizer saw)."""
        last = self.total_steps - self.final_steps
        if step > last:
            self._mask()
            return
        if step < last:
            self._update_importance(gradients)
        budget, allocate = self.budget(step)
        if allocate or step == last:
            self._allocate(budget)

    def _update_importance(self, gradients: dict[str, Any]) -> None:
        """All parameters as one vector: a handful of operations instead of thousands."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        importance = mx.abs(self._joined(self.deltas) * self._joined(gradients))
        average = mx.zeros_like(importance) if self.average is None else self.average
        uncertainty = mx.zeros_like(importance) if self.uncertainty is None else self.uncertainty
        self.average = beta1 * average + (1 - beta1) * importance
        self.uncertainty = beta2 * uncertainty + (1 - beta2) * mx.abs(importance - self.average)
        mx.eval(self.average, self.uncertainty)

    def _joined(self, values: Mapping[str, Any]) -> mx.array:
        """a, e and b of each path after one another."""
        return mx.concatenate([values[path][name].reshape(-1) for path in self.deltas for name in ("a", "e", "b")])

    def scores(self) -> dict[str, mx.array]:
        """Path -> how much each rank matters, (rank,): sensitivity times uncertainty of E, A's row and B's column."""
        assert self.average is not None and self.uncertainty is not None
        sizes = [delta[name].size for delta in self.deltas.values() for name in ("a", "e", "b")]
        parts = iter(mx.split(self.average * self.uncertainty, np.cumsum(sizes)[:-1].tolist()))
        scores = {}
        for path, delta in self.deltas.items():
            a, e, b = (next(parts).reshape(delta[name].shape) for name in ("a", "e", "b"))
            scores[path] = e[:, 0] + mx.mean(a, axis=1) + mx.mean(b, axis=0)
        return scores

    def _allocate(self, budget: int) -> None:
        if self.average is None:
            return
        scores = self.scores()
        everything = mx.sort(mx.concatenate(list(scores.values())))
        excess = self.initial_budget - budget
        # With vanishing gradients all scores tie and a threshold would prune every rank: keep what is in force.
        if excess <= 0 or float(everything[-1]) <= float(everything[excess - 1]):
            return
        threshold = everything[excess - 1]
        self.kept = {path: (score > threshold)[:, None] for path, score in scores.items()}
        self._mask()

    def _mask(self) -> None:
        if self.kept is not None:
            for path, keep in self.kept.items():
                self.deltas[path].e = mx.where(keep, self.deltas[path].e, 0.0)

    def take_over(self, other: AdaLoRA) -> None:
        """Goes on from another one's weights. Ranks that it has lost (all zero, where no gradient could ever bring them
        back) stay fresh, with E = 0: the outputs are the other's, and budget can be moved there again."""
        for path, delta in self.deltas.items():
            theirs = other.deltas[path]
            lost = mx.all(theirs.a == 0, axis=1, keepdims=True) & (theirs.e == 0)
            delta.a = mx.where(lost, delta.a, theirs.a)
            delta.b = mx.where(lost.T, delta.b, theirs.b)
            delta.e = theirs.e

    def ranks(self) -> dict[str, int]:
        """Path -> rank in force."""
        if self.kept is None:
            return {path: int(delta.e.size) for path, delta in self.deltas.items()}
        return {path: int(mx.sum(keep)) for path, keep in self.kept.items()}

    def state(self) -> dict[str, mx.array]:
        """What an exact resume needs beyond the weights."""
        result = {f"kept/{path}": keep for path, keep in (self.kept or {}).items()}
        if self.average is not None and self.uncertainty is not None:
            result |= {"average": self.average, "uncertainty": self.uncertainty}
        return result

    def restore(self, state: dict[str, mx.array]) -> None:
        self.average, self.uncertainty = state.get("average"), state.get("uncertainty")
        kept = {name.removeprefix("kept/"): value for name, value in state.items() if name.startswith("kept/")}
        self.kept = kept or None


def create(config: AdaLoRAConfig, model: nn.Module, seed: int) -> AdaLoRA:
    """A fresh AdaLoRA: E zero, so the model's output is unchanged; A and B normal with standard deviation 0.02."""
    keys = iter(mx.random.split(mx.random.key(seed), 4096))
    deltas: dict[str, nn.Module] = {}
    rank = config.initial_rank
    for path, linear in adaptable(model, config.targets, config.layers).items():
        outputs, inputs = shape(linear)
        a = 0.02 * mx.random.normal((rank, inputs), key=next(keys))
        b = 0.02 * mx.random.normal((outputs, rank), key=next(keys))
        deltas[path] = triplet(config, a, mx.zeros((rank, 1)), b, rank)
    return AdaLoRA(config, deltas)


def triplet(config: AdaLoRAConfig, a: mx.array, e: mx.array, b: mx.array, initial_rank: int) -> TripletLowRank:
    return TripletLowRank(a, e, b, config.alpha / (initial_rank + 1e-5), config.dropout)


def tensors(adapter: AdaLoRA) -> dict[str, mx.array]:
    """Weights under Hugging Face PEFT's names; ranks out of force keep E = 0."""
    result: dict[str, mx.array] = {}
    for path, delta in adapter.deltas.items():
        result |= {f"base_model.model.{path}.lora_{n.upper()}": delta[n] for n in ("a", "e", "b")}
    return result


def from_tensors(config: AdaLoRAConfig, weights: dict[str, mx.array]) -> AdaLoRA:
    """The adapter that `tensors` came from (its ranks may have been trimmed)."""
    prefix, suffix = "base_model.model.", ".lora_A"
    deltas: dict[str, nn.Module] = {}
    for name, a in weights.items():
        if name.endswith(suffix):
            path = name[len(prefix) : -len(suffix)]
            e, b = (weights[f"{prefix}{path}.lora_{n}"] for n in ("E", "B"))
            deltas[path] = triplet(config, a, e, b, config.initial_rank)
    return AdaLoRA(config, deltas)
