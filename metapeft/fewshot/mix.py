"""Mixing adapters by weights that are found without gradients, on the shots (LoraHub, Huang et al. 2023,
arXiv:2307.13269).

LoraHub adds the matrices A and B of several LoRAs each; here their products B A are added, which is what the sum of
the adapters computes. The weights make the loss on the shots small, with a price on their size, by a (1+1)-evolution
strategy (Rechenberg 1973) that begins at the best of: each one alone, the mean of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from metapeft.fewshot.measure import answers
from metapeft.fewshot.starts import average, factors, mixed, owners, top_layers, whole
from metapeft.peft import adapters
from metapeft.peft.lora import MatrixAdapter
from metapeft.peft.saved import Saved
from metapeft.runtime import mx
from metapeft.training.session import Session

PRICE = 0.05  # of the sum of absolute weights, in nats: LoraHub's
LARGEST = 1.5  # weight: LoraHub's
TRIES = 24


def mix(session: Session, saved: Sequence[Saved], *, tries: int = TRIES, seed: int = 0) -> tuple[Saved, list[float]]:
    """The mixture that answers the session's training split best, and its weights. Raises UserError for adapters that
    change no matrices."""

    parts = [factors(each) for each in saved]
    adapter = adapters.build(whole(mixed(parts, [1.0] * len(parts)), top_layers(saved)), session.model)
    assert isinstance(adapter, MatrixAdapter)
    full = {path: delta.b for path, delta in adapter.deltas.items()}
    # Which weight each column of B gets; what pads it is zero anyway.
    columns = {path: np.resize(owner, full[path].shape[1]) for path, owner in owners(parts).items()}

    def cost(weights: np.ndarray) -> float:
        for path, delta in adapter.deltas.items():
            delta.b = full[path] * mx.array(weights[columns[path]].astype(np.float32))
        loss = float(answers(session, adapter, "train").loss.mean())
        return loss + PRICE * float(np.abs(weights).sum())

    count = len(saved)
    begins = [np.full(count, 1 / count), *np.eye(count)]
    adapter.attach(session.model)
    try:
        weights = minimised(cost, begins, tries, seed).tolist()
    finally:
        adapter.detach(session.model)
    return average(saved, weights), weights


def minimised(cost: Callable[[np.ndarray], float], begins: Sequence[np.ndarray], tries: int, seed: int) -> np.ndarray:
    """The best point found: the best of `begins`, and from there `tries` steps of a (1+1)-evolution strategy, whose
    step grows by half when it succeeds and shrinks so that one success in five keeps it."""
    random = np.random.default_rng(seed)
    values = [cost(point) for point in begins]
    best = int(np.argmin(values))
    point, value, step = begins[best], values[best], 0.25
    for _ in range(tries):
        trial = np.clip(point + step * random.standard_normal(len(point)), -LARGEST, LARGEST)
        found = cost(trial)
        if found < value:
            point, value, step = trial, found, step * 1.5
        else:
            step *= 1.5**-0.25
    return point
