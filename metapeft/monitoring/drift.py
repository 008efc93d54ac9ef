"""Are incoming tasks like those that the champion learned from? Their profiles, feature by feature.

    ks     the largest Kolmogorov-Smirnov distance of any feature, between the last WINDOW tasks and the known ones
    means  the largest difference of any feature's mean, over the last 10, 20 and 30 tasks, in standard errors

The former is multiplied by the root of n m / (n + m), which makes windows of different size comparable. Both are looked
at after every new task; how high they get without a change is simulated with whole profiles, so that features which go
together count as what they are. What is told to people is the population stability index (bins of equal share of the
known tasks), averaged over features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from metapeft.monitoring.limits import HORIZON, WINDOW, Limit, drawn, highest, windowed, worlds
from metapeft.monitoring.watches import SHARES, Finding
from metapeft.profiling.profiles import SCALES

BINS = 4
LEAST_KNOWN, LEAST_NEW = 8, 10  # tasks
LENGTHS = (10, 20, 30)  # of the windows of means
MOST = 4.0  # usual spreads from the usual middle: more says no more, as in a task's embedding
LEAST_SPREAD = 0.5  # usual spreads: one odd task among known ones that are all alike is no drift
RUNS = 200


@dataclass(frozen=True)
class Profiles:
    """rows: (tasks, features) on common scales; families: of the tasks."""

    rows: np.ndarray
    families: tuple[str, ...]

    @cached_property
    def ordered(self) -> np.ndarray:
        found: np.ndarray = np.sort(self.rows, axis=0)
        return found

    @cached_property
    def edges(self) -> np.ndarray:
        """(features, BINS - 1)"""
        found: np.ndarray = np.quantile(self.rows, np.arange(1, BINS) / BINS, axis=0).T
        return found

    def places(self, rows: np.ndarray) -> np.ndarray:
        """(rows, features) bins."""
        return np.array([np.searchsorted(e, rows[:, i], side="left") for i, e in enumerate(self.edges)]).T

    @cached_property
    def shares(self) -> np.ndarray:
        """(features, BINS) of the known tasks, smoothed."""
        return _smoothed(_counted(self.places(self.rows)).sum(axis=0))

    def ks(self, rows: np.ndarray) -> np.ndarray:
        """(features,) distances between these rows and the known ones."""
        found = []
        for known, new in zip(self.ordered.T, np.sort(rows, axis=0).T, strict=True):
            at = np.concatenate([known, new])
            a, b = (np.searchsorted(s, at, side="right") / len(s) for s in (known, new))
            found.append(float(np.abs(a - b).max()))
        return np.array(found)

    def psi(self, rows: np.ndarray) -> np.ndarray:
        """(features,)"""
        return _index(self.shares, _smoothed(_counted(self.places(rows)).sum(axis=0)))

    @cached_property
    def standards(self) -> tuple[np.ndarray, np.ndarray]:
        """(features,) each: mean and spread of the known tasks."""
        kept = np.clip(self.rows, -MOST, MOST)
        return kept.mean(axis=0), np.maximum(kept.std(axis=0, ddof=1), LEAST_SPREAD)

    def standardised(self, rows: np.ndarray) -> np.ndarray:
        mean, spread = self.standards
        found: np.ndarray = (np.clip(rows, -MOST, MOST) - mean) / spread
        return found

    def away(self, rows: np.ndarray) -> np.ndarray:
        """(windows, features): how far the means of the last 10, 20 and 30 rows, as far as there are so many, are from
        the known ones, in standard errors of both."""
        values, n = self.standardised(rows), len(self.rows)
        lengths = [m for m in LENGTHS if m <= len(rows)]
        return np.array([np.abs(values[-m:].sum(axis=0)) / (m * (1 + m / n)) ** 0.5 for m in lengths])

    def statistics(self, rows: np.ndarray) -> dict[str, float]:
        """Of the last rows."""
        n, m = len(self.rows), len(rows)
        return {"ks": float(self.ks(rows).max() * (n * m / (n + m)) ** 0.5), "means": float(self.away(rows).max())}

    @cached_property
    def highest(self) -> dict[str, np.ndarray]:
        """(RUNS,) each, ascending: how high the statistics get in histories of the known tasks themselves."""
        random = np.random.default_rng(0)
        tasks = drawn(worlds(self.families, random, RUNS), HORIZON, random)
        n, own = len(self.rows), self.standardised(self.rows)
        order = np.argsort(self.rows, axis=0, kind="stable")
        last = np.ones(self.rows.shape, dtype=bool)  # of equal values, where the distribution has made its whole step
        last[:-1] = np.diff(self.ordered, axis=0) > 0
        known = (np.arange(n) + 1)[:, None] / n
        m = np.minimum(np.arange(HORIZON) + 1, WINDOW)[:, None]
        size = (n * m / (n + m))[:, 0]
        found: dict[str, list[float]] = {"ks": [], "means": []}
        for run in tasks:
            counts = windowed(np.eye(n, dtype=np.float32)[run], axis=0)
            far = np.zeros(HORIZON)
            for feature in range(self.rows.shape[1]):
                if last[:-1, feature].any():
                    steps = np.cumsum(counts[:, order[:, feature]], axis=1) / m
                    away = np.abs(steps - known.T)[:, last[:, feature]]
                    far = np.maximum(far, away.max(axis=1))
            found["ks"].append(float((far * size**0.5)[LEAST_NEW - 1 :].max()))
            sums = ((windowed(own[run], 0, few)[few - 1 :], few * (1 + few / n)) for few in LENGTHS)
            found["means"].append(max(float(np.abs(s).max()) / variance**0.5 for s, variance in sums))
        return {name: highest(np.array(values)[:, None]) for name, values in found.items()}


def _counted(places: np.ndarray) -> np.ndarray:
    """(rows, features) -> (rows, features, BINS) of 0 and 1."""
    return np.eye(BINS, dtype=np.float32)[places]


def _smoothed(counts: np.ndarray) -> np.ndarray:
    found: np.ndarray = (counts + 0.5) / (counts.sum(axis=-1, keepdims=True) + 0.5 * BINS)
    return found


def _index(known: np.ndarray, new: np.ndarray) -> np.ndarray:
    found: np.ndarray = ((new - known) * np.log(new / known)).sum(axis=-1)
    return found


def scaled(features: dict[str, float]) -> np.ndarray:
    """(features,) of a profile on common scales."""
    return np.array([(change(features[n]) - centre) / scale for n, (change, centre, scale) in SCALES.items()])


def watch(
    known: Profiles, rows: np.ndarray, places: Sequence[int], false_alarms: float
) -> tuple[Finding, dict[str, float]]:
    """How incoming tasks stand to the known ones; and, while that is an alert, the features that moved most, with the
    difference of their means in spreads of the known tasks. rows: (tasks, features), the oldest first; places: of the
    decisions that brought them."""
    limits = {t: Limit(known.highest[t], false_alarms * SHARES["profiles", t]) for t in ("ks", "means")}
    alarms: list[int] = []
    fired = since = None
    start, worst, chance, test = 0, 0.0, 1.0, "ks"
    level = expected = at_alarm = float("nan")
    moved: dict[str, float] = {}
    for now in range(len(rows)):
        own = rows[max(start, now + 1 - WINDOW) : now + 1]
        if len(own) < LEAST_NEW:
            continue
        found = known.statistics(own)
        evidence = {t: value / limits[t].value for t, value in found.items()}
        best = max(evidence, key=lambda t: evidence[t])
        level = float(known.psi(own).mean())
        expected = (BINS - 1) * (1 / len(own) + 1 / len(known.rows))
        if fired is not None:
            if now - fired >= WINDOW and evidence[best] < 0.75:
                fired, since, start, worst, chance = None, None, now + 1, 0.0, 1.0
            continue
        worst, test, chance = evidence[best], best, limits[best].chance(found[best])
        if worst >= 1:
            far = known.ks(own)[None] if best == "ks" else known.away(own)
            window = int(far.max(axis=1).argmax())
            length = len(own) if best == "ks" else LENGTHS[window]
            shifts = known.standardised(own[-length:]).mean(axis=0)
            moved = {list(SCALES)[i]: float(shifts[i]) for i in np.argsort(-far[window], kind="stable")[:3]}
            fired, since, at_alarm = now, now + 1 - length, level
            alarms.append(now)
    return (
        Finding(
            watch="profiles",
            value=level,
            expected=expected,
            evidence=worst,
            test=test,
            chance=chance,
            decisions=len(rows),
            fired=None if fired is None else places[fired],
            since=None if since is None else places[since],
            alarms=tuple(places[a] for a in alarms),
            at_alarm=at_alarm,
        ),
        moved if fired is not None else {},
    )
