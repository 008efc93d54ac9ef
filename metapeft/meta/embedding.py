"""Where a task lies among others: an embedding whose distances are learned from how configurations performed.

Two tasks are as far apart as the same configurations fare differently on them, after each task's own level is taken
out. Those distances are regressed on the squared differences of profile features, with weights that cannot be negative
(a metric) and are drawn towards equal ones, so that with few tasks it is little more than the plain profile. The
embedding is the profile's features times the root of the weights: learned again, it changes for all tasks at once, and
is computed from the stored profile whenever it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metapeft.meta.evidence import FEATURES, Known, Observation

SHARED = 4  # configurations that two tasks must both have been tried with to be compared
PRIOR = 1.0  # how many pairs of tasks the equal weights are worth, per feature, in units of the typical pair
PASSES = 200


@dataclass(frozen=True)
class Metric:
    """Weights of the features called FEATURES; distances between known tasks are about 1 in the middle."""

    weights: tuple[float, ...]

    def embed(self, task: Known) -> np.ndarray:
        """(features,); zeros for a task without a profile."""
        return task.vector * np.sqrt(self.weights)

    def similarity(self, left: Sequence[Known], right: Sequence[Known], length: float = 1.0) -> np.ndarray:
        """(left, right) in [0, 1]: a Gaussian kernel on distances; 0 where a profile is missing."""
        a, b = (np.array([self.embed(t) for t in side]).reshape(-1, len(FEATURES)) for side in (left, right))
        squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
        found = np.exp(-0.5 * np.maximum(squared, 0) / length**2)
        known = np.outer([t.features is not None for t in left], [t.features is not None for t in right])
        return np.where(known, found, 0.0)

    def to_json(self) -> dict[str, Any]:
        return dict(zip(FEATURES, self.weights, strict=True))

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Metric:
        return cls(tuple(float(record.get(name, 0.0)) for name in FEATURES))


def plain() -> Metric:
    """All features alike."""
    return Metric(tuple(np.full(len(FEATURES), 1 / (2 * len(FEATURES)))))


def learn(observations: Sequence[Observation]) -> Metric:
    """Non-negative ridge regression by coordinate descent; `plain()` when no two tasks can be compared."""
    tasks = sorted({o.task for o in observations if o.task.features is not None}, key=lambda t: (t.version, t.backbone))
    tables = _centred(observations)
    rows, targets, counts = [], [], []
    for i, a in enumerate(tasks):
        for b in tasks[:i]:
            shared = sorted(tables[a].keys() & tables[b].keys())
            if len(shared) >= SHARED:
                here, there = (np.array([tables[t][k] for k in shared]) for t in (a, b))
                apart = (here - here.mean()) - (there - there.mean())
                rows.append((a.vector - b.vector) ** 2)
                targets.append(float(np.mean(apart**2)))
                counts.append(len(shared))
    if len(rows) < len(FEATURES) or np.ptp(targets) == 0:
        return plain()
    design, target = np.array(rows), np.array(targets)
    weight = np.minimum(counts, 20) / 20
    typical = float(np.average(target, weights=weight))
    target = np.minimum(target / typical, 4.0)  # a few wildly different pairs are not all there is
    usual = max(1e-9, float(np.average(design.sum(axis=1), weights=weight)))
    start = 0.5 / usual  # half of the typical difference is believed to be the features'
    learned = _non_negative(design, target, weight, prior=start)
    scale = max(1e-9, float(np.median(design @ learned)))
    return Metric(tuple(float(w) for w in learned / scale))


def _centred(observations: Sequence[Observation]) -> dict[Known, dict[str, float]]:
    """Task -> configuration and budget -> gain less the task's mean."""
    tables: dict[Known, dict[str, float]] = {}
    for o in observations:
        tables.setdefault(o.task, {})[f"{o.steps} {o.key}"] = o.gain
    return tables


def _non_negative(design: np.ndarray, target: np.ndarray, weight: np.ndarray, prior: float) -> np.ndarray:
    """argmin over weights w >= 0 and intercept b of sum_i weight_i (target_i - b - design_i w)^2 + ridge |w - prior|^2.

    The ridge is on the scale of each column, so that features that vary much are not favoured.
    """
    weight = weight / weight.sum()
    centre = weight @ design
    columns = design - centre
    spread = np.sqrt(weight @ columns**2)
    ridge = PRIOR * np.maximum(spread, 1e-3) ** 2 / math.sqrt(len(target))
    w = np.full(design.shape[1], prior)
    left = target - weight @ target - columns @ w
    for _ in range(PASSES):
        before = w.copy()
        for j in range(len(w)):
            column = columns[:, j]
            gram = weight @ column**2
            step = (weight @ (column * left) - ridge[j] * (w[j] - prior)) / (gram + ridge[j] + 1e-12)
            new = max(0.0, w[j] + step)
            left -= column * (new - w[j])
            w[j] = new
        if np.abs(w - before).max() < 1e-6 * max(1e-9, np.abs(w).max()):
            break
    return w
