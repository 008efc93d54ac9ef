"""What a learning curve that broke off says about where it would have ended.

Finished trials tell: how much gain came after a quarter, a half, three quarters of the steps, and how much that varied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metapeft.meta.gains import gain
from metapeft.training.trial import Trial

FRACTIONS = (0.25, 0.5, 0.75)
BELIEVED = ((0.15, 0.2), (0.06, 0.12), (0.02, 0.06))  # (mean, standard deviation) of the gain still to come
WORTH = 10  # trials that the beliefs are worth


@dataclass(frozen=True)
class Remaining:
    """(mean, standard deviation) of the gain still to come at each of FRACTIONS of the steps."""

    points: tuple[tuple[float, float], ...] = BELIEVED

    def at(self, fraction: float) -> tuple[float, float]:
        """Between the points linearly; nothing at the end."""
        where = (*FRACTIONS, 1.0)
        means, deviations = zip(*self.points, (0.0, 0.0), strict=True)
        return float(np.interp(fraction, where, means)), float(np.interp(fraction, where, deviations))

    def to_json(self) -> list[list[float]]:
        return [list(point) for point in self.points]

    @classmethod
    def from_json(cls, record: Any) -> Remaining:
        return cls(tuple((float(mean), float(deviation)) for mean, deviation in record))


def learn(trials: Iterable[Trial]) -> Remaining:
    """From the finished trials with at least two validated points, by the share of the way that a point is at."""
    rest: list[list[float]] = [[] for _ in FRACTIONS]
    for trial in trials:
        if trial.status != "ok" or trial.untuned_score is None:
            continue
        seen = [
            (p["step"] / trial.budget, p["validation_score"])
            for p in trial.curve
            if p.get("validation_score") is not None
        ]
        if len(seen) < 2 or seen[-1][0] < 0.99:
            continue
        base = trial.untuned_score.value
        final = gain(max(score for _, score in seen), base)  # the best checkpoint is what is kept
        for i, fraction in enumerate(FRACTIONS):
            before = [score for share, score in seen if share <= fraction + 0.05]
            if before and seen[0][0] <= fraction + 0.05:
                rest[i].append(final - gain(max(before), base))
    return Remaining(tuple(_shrunk(values, belief) for values, belief in zip(rest, BELIEVED, strict=True)))


def fraction(trial: Trial) -> float:
    """How far a trial came."""
    steps = [p["step"] for p in trial.curve if p.get("step") is not None]
    return min(1.0, max(steps, default=0) / max(1, trial.budget))


def _shrunk(values: list[float], belief: tuple[float, float]) -> tuple[float, float]:
    mean, deviation = belief
    n = len(values)
    middle = (WORTH * mean + math.fsum(values)) / (WORTH + n)
    spread = (WORTH * (deviation**2 + (mean - middle) ** 2) + math.fsum((v - middle) ** 2 for v in values)) / (
        WORTH + n
    )
    return middle, math.sqrt(spread)
