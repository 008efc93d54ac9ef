"""From which value on a statistic is no chance any more: measured on simulated histories in which nothing changes.

A statistic is looked at after every decision, so what matters is how high it ever gets. RUNS histories of HORIZON
decisions are drawn from what the promise rests on; a limit is the quantile of their highest values that a stated number
of false alarms per 1,000 decisions allows. How well the promise itself is known counts too: each history has a truth of
its own, the judged families reweighted at random (the Bayesian bootstrap, Rubin 1981; families, since tasks of a family
are no independent witnesses). With few judged tasks limits are therefore higher and changes are found later.

What is watched: Page-Hinkley (Page 1954), a cumulative sum that starts again from zero whenever it falls below, and
the mean of a window in units of its standard error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RUNS, HORIZON = 600, 1000
WINDOW, LEAST = 30, 8  # decisions of a window; before there are so many nothing is said


@dataclass(frozen=True)
class Limit:
    """highest: (RUNS,) ascending, the highest value of a statistic in each history without a change."""

    highest: np.ndarray
    per_thousand: float  # false alarms that are allowed

    @property
    def value(self) -> float:
        allowed = min(0.5, self.per_thousand * HORIZON / 1000)
        return max(1e-9, float(np.quantile(self.highest, 1 - allowed, method="higher")))

    def chance(self, statistic: float) -> float:
        """Share of histories of HORIZON decisions without a change in which it gets so high."""
        return float((self.highest >= statistic).sum() + 1) / (len(self.highest) + 1)


def worlds(families: Sequence[str], random: np.random.Generator, runs: int = RUNS) -> np.ndarray:
    """(runs, tasks) weights of the judged tasks that sum to one in every row: what might be true of a population of
    which these tasks are a sample of families."""
    names = sorted(set(families))
    drawn = random.exponential(size=(runs, len(names)))[:, [names.index(f) for f in families]]
    found: np.ndarray = drawn / drawn.sum(axis=1, keepdims=True)
    return found


def drawn(weights: np.ndarray, length: int, random: np.random.Generator) -> np.ndarray:
    """(runs, length) tasks, by the weights of each run."""
    edges = np.cumsum(weights, axis=1)
    points = random.random((len(weights), length))
    return np.array([np.minimum(np.searchsorted(e, p), len(e) - 1) for e, p in zip(edges, points, strict=True)])


def page_hinkley(values: np.ndarray, weight: float, delta: float) -> np.ndarray:
    """(runs, length) values whose expected mean is 0 -> the statistic after each.

    The mean is known beforehand, as well as from `weight` values, and goes on being estimated; delta is how much more
    than the mean is tolerated. The same as river's PageHinkley (mode "up", alpha 1) that was shown `weight` zeros.
    """
    mean = np.zeros(len(values))
    total, lowest = np.full(len(values), -delta * weight), np.full(len(values), -delta * weight)
    found = np.empty(values.shape)
    for place in range(values.shape[1]):
        value = values[:, place]
        mean = mean + (value - mean) / (weight + place + 1)
        total = total + value - mean - delta
        lowest = np.minimum(lowest, total)
        found[:, place] = total - lowest
    return found


def windows(values: np.ndarray) -> np.ndarray:
    """(…, length) -> sum of the last WINDOW values over the root of their number; -inf before there are LEAST."""
    sums = windowed(values)
    counts = np.minimum(np.arange(values.shape[-1]) + 1, WINDOW)
    found: np.ndarray = np.where(counts >= LEAST, sums / np.sqrt(counts), -np.inf)
    return found


def windowed(values: np.ndarray, axis: int = -1, length: int = WINDOW) -> np.ndarray:
    """Sums of the last `length` values (of all, while there are fewer)."""
    sums = np.cumsum(values, axis=axis)
    before = np.roll(sums, length, axis=axis)
    first = [slice(None)] * values.ndim
    first[axis] = slice(0, length)
    before[tuple(first)] = 0
    found: np.ndarray = sums - before
    return found


def highest(statistic: np.ndarray) -> np.ndarray:
    """(runs, length) -> (runs,), ascending."""
    found: np.ndarray = np.sort(statistic.max(axis=1))
    return found
