"""Ending hopeless trials: Optuna cannot prune with several objectives, so here is a rule of our own.

At every evaluation of a training the final score is predicted from recorded learning curves: of trials that stood
alike (share of the budget, best score so far, its last rise, loss), what share of the missing score did they still
gain? The trial is hopeless if, with a probability above 1 - alpha, it will not beat any finished trial that is about as
cheap or cheaper in time and memory: then it will not be on the front.

A false stop is a stopped trial that would have beaten all of those after all. `calibrated` replays recorded full curves
as sweeps, each task with the curves of the others, and takes the largest alpha whose share of false stops, HARDER times
over, is at most TARGET, as surely as SURE. Without enough recorded curves nothing is ever stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metapeft.search import pareto
from metapeft.training.trial import Trial

TARGET = 0.05  # false stops among the stops
SURE = 0.9
HARDER = 2.5  # as many false stops has a sweep, which searches near the front, as the replay (benchmarks/sweeps.py)
ALPHAS = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
SLOWER, LARGER = 1.1, 1.02  # seconds and memory that differ by less count as the same: seconds vary between runs
LEAST_ALIKE = 8.0  # (effective) recorded curves that stood alike
LEAST_DEVIATION = 0.02  # of a predicted score
OTHER_TASK = 0.3  # weight of a curve of another task
# Standard deviations of the kernel: share of the budget, best score so far, its last rise, log loss.
WIDTHS = np.array([0.15, 0.2, 0.15, 0.7])
SLACK = 0.05  # added to the missing score: it must not vanish near 1


@dataclass(frozen=True)
class Curves:
    """Moments of recorded trainings. state (moments, 4); rise (moments,): share of the missing score gained later;
    task (moments,): whose they are."""

    state: np.ndarray
    rise: np.ndarray
    task: np.ndarray


@dataclass(frozen=True)
class Replayed:
    """A replay's outcome, over all its orders. `saved` is the share of all training seconds that stopping saved."""

    trials: int = 0
    stops: int = 0
    false_stops: int = 0
    saved: float = 0.0
    orders: int = 1

    @property
    def rate(self) -> float:
        return self.false_stops / self.stops if self.stops else 0.0

    @property
    def bound(self) -> float:
        """What the rate does not exceed, as surely as SURE: a quantile of Jeffreys' posterior (Brown, Cai and DasGupta
        2001). A trial says as much in several orders as in one."""
        from scipy.stats import beta

        stops, false = self.stops / self.orders, self.false_stops / self.orders
        return float(beta.ppf(SURE, false + 0.5, stops - false + 0.5))


@dataclass(frozen=True)
class StopRule:
    """`alpha` 0 never stops. `replayed` is what the replay that chose it came to."""

    curves: Curves
    alpha: float = 0.0
    replayed: Replayed = field(default_factory=Replayed)

    def hopeless(
        self,
        curve: Sequence[dict[str, Any]],
        steps: int,
        finished: Sequence[Trial],
    ) -> bool:
        """Whether to stop now. curve: rows with a validation score, as in `Trial.curve`; `peak_memory_mb` may be in the
        last one. finished: trials of this task that ended well."""
        if self.alpha <= 0 or not curve or curve[-1]["step"] >= steps:
            return False
        needed = _needed(curve, steps, finished)
        if needed is None:
            return False
        predicted = self.predict(curve, steps, finished)
        return predicted is not None and _above(*predicted, needed) < self.alpha

    def predict(
        self,
        curve: Sequence[dict[str, Any]],
        steps: int,
        finished: Sequence[Trial] = (),
        without: str = "",
    ) -> tuple[float, float] | None:
        """Mean and standard deviation of the final score; None where too few recorded curves stood alike.

        without: version of a task whose recorded curves are left out (its finished trials count by themselves).
        """
        own = collect(finished)
        version = finished[0].task_version if finished else without
        weights = np.where((self.curves.task == version) | (self.curves.task == without), 0.0, OTHER_TASK)
        state = np.concatenate([self.curves.state, own.state])
        rise = np.concatenate([self.curves.rise, own.rise])
        weights = np.concatenate([weights, np.ones(len(own.rise))])
        here = _state(curve, steps)
        if not len(rise) or not np.isfinite(here).all():
            return None
        weights = weights * np.exp(-0.5 * (((state - here) / WIDTHS) ** 2).sum(axis=1))
        total = weights.sum()
        alike = total**2 / max(float((weights**2).sum()), 1e-300)
        if total < 0.05 or alike < LEAST_ALIKE:
            return None
        mean = float(weights @ rise / total)
        deviation = math.sqrt(float(weights @ (rise - mean) ** 2 / total) * (1 + 1 / alike))
        best, missing = here[1], 1 - here[1] + SLACK
        score, error = best + missing * mean, max(missing * deviation, LEAST_DEVIATION)
        return float(score), float(error)


def calibrated(trials: Iterable[Trial], target: float = TARGET) -> StopRule:
    """The rule that these recorded trials support: see the module's text."""
    recorded = [t for t in trials if _usable(t)]
    curves = collect(recorded)
    never = StopRule(curves)
    for alpha in ALPHAS:
        rule = StopRule(curves, alpha)
        outcome = replay(rule, recorded)
        if HARDER * outcome.bound <= target:
            return StopRule(curves, alpha, outcome)
    return never


def replay(rule: StopRule, trials: Iterable[Trial], seeds: int = 2) -> Replayed:
    """Recorded trials as sweeps, in `seeds` random orders per task and budget: what would the rule have stopped?

    Each task is judged with the recorded curves of the others, and with its own trials that had finished before.
    """
    places: dict[tuple[str, str, int], list[Trial]] = {}
    for trial in trials:
        if _usable(trial):
            places.setdefault((trial.task_version, trial.backbone, trial.budget), []).append(trial)
    count = stops = wrong = 0
    spent = saved = 0.0
    for (version, _, steps), place in sorted(places.items()):
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(place))
            finished: list[Trial] = []
            for trial in (place[i] for i in order):
                count += 1
                seconds = trial.train_seconds or trial.seconds
                spent += seconds
                curve: list[dict[str, Any]] = []
                for row in _measured(trial):
                    curve.append(row | {"peak_memory_mb": trial.peak_memory_mb})
                    if row["step"] >= steps or not _stops(rule, curve, steps, finished, version):
                        continue
                    stops += 1
                    saved += max(0.0, seconds - row["seconds"])
                    needed = _needed(curve, steps, finished)
                    final = pareto.judged(trial)
                    wrong += bool(final and needed is not None and final.value > needed)
                    break
                else:
                    finished.append(trial)
    return Replayed(count, stops, wrong, saved / spent if spent else 0.0, seeds)


def collect(trials: Iterable[Trial]) -> Curves:
    """The moments of all usable trials: every evaluation before the end."""
    states, rises, tasks = [], [], []
    for trial in trials:
        final = pareto.judged(trial)
        if not _usable(trial) or final is None:
            continue
        rows = _measured(trial)
        for end in range(1, len(rows) + 1):
            if rows[end - 1]["step"] >= trial.budget:
                continue
            state = _state(rows[:end], trial.budget)
            if np.isfinite(state).all():
                states.append(state)
                rises.append((final.value - state[1]) / (1 - state[1] + SLACK))
                tasks.append(trial.task_version)
    return Curves(np.array(states).reshape(-1, len(WIDTHS)), np.array(rises, dtype=float), np.array(tasks, dtype=str))


def _stops(rule: StopRule, curve: list[dict[str, Any]], steps: int, finished: list[Trial], version: str) -> bool:
    needed = _needed(curve, steps, finished)
    predicted = rule.predict(curve, steps, finished, without=version) if needed is not None else None
    return needed is not None and predicted is not None and _above(*predicted, needed) < rule.alpha


def _needed(curve: Sequence[dict[str, Any]], steps: int, finished: Sequence[Trial]) -> float | None:
    """The best score among finished trials that are about as cheap or cheaper; None: there is none."""
    last = curve[-1]
    seconds = last["seconds"] * steps / last["step"]
    return best_as_cheap(finished, seconds, last.get("peak_memory_mb") or math.inf)


def best_as_cheap(finished: Sequence[Trial], seconds: float, memory_mb: float) -> float | None:
    """The best score among trials that take about as many seconds and MiB, or fewer; None: there is none."""
    points = [p for t in finished if (p := pareto.objectives(t)) is not None]
    cheap = (p[0] for p in points if p[1] <= SLOWER * seconds and p[2] <= LARGER * memory_mb)
    return max(cheap, default=None)


def _state(curve: Sequence[dict[str, Any]], steps: int) -> np.ndarray:
    """Share of the budget, best score so far, its last rise, log loss."""
    scores = [row["validation_score"] for row in curve]
    best, before = max(scores), max(scores[:-1], default=0.0)
    rise = best - before if len(scores) > 1 else 0.0
    loss = curve[-1].get("validation_loss")
    loss = math.nan if loss is None else math.log(max(loss, 1e-4))
    return np.array([curve[-1]["step"] / steps, best, rise, loss])


def _above(mean: float, deviation: float, needed: float) -> float:
    """P(score > needed)"""
    return 0.5 * math.erfc((needed - mean) / (deviation * math.sqrt(2)))


def _usable(trial: Trial) -> bool:
    """Full curves only: a trial that ended well, with an evaluation before its end."""
    rows = _measured(trial)
    return pareto.objectives(trial) is not None and bool(rows) and rows[0]["step"] < trial.budget


def _measured(trial: Trial) -> list[dict[str, Any]]:
    return [row for row in trial.curve if row.get("validation_score") is not None]
