"""Where a learning curve that is still being drawn will end, learned from curves that are known to their end.

At every evaluation before the end, a Gaussian process (Rasmussen and Williams 2006, sections 2.2 and 5.4) predicts the
gain still to come from where the training stands: how far it is, its best gain, its last rise, validation and training
loss, their slope. Unlike a fitted power law it knows how curves of this kind usually go on, and three points are
enough; unlike a table of mean rises it looks at the loss, which moves before the score does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metapeft.meta.evidence import families
from metapeft.meta.gains import gain
from metapeft.training.trial import Trial

MOST = 400  # moments that a process is conditioned on
LEAST = 20  # recorded moments without which nothing is learned
BELIEVED = (0.2, 0.25)  # mean and deviation of the gain still to come at the start, without evidence
LOSS_FLOOR = 1e-3  # nats
# Beliefs about the deviations (of the linear part, of the wandering part, its length, of the noise at the end and what
# a whole budget that is left adds to its logarithm), in units of the rise's own deviation; and how sure they are.
BELIEFS = np.log([0.5, 0.6, 2.5, 0.5, math.e])
FREEDOM = 0.7


@dataclass(frozen=True)
class Moment:
    """A training that is not at its end. rise: what it gained afterwards, where that is known."""

    state: np.ndarray  # (8,)
    left: float  # share of its steps
    best: float  # gain so far
    family: str = ""
    rise: float = math.nan


def moment(curve: Sequence[dict[str, Any]], steps: int, untuned: float) -> Moment:
    """Where a training of `steps` stands after the evaluations in `curve` (rows of `Trial.curve`, at least one)."""
    scores = [gain(row["validation_score"], untuned) for row in curve]
    best = max(scores)
    last = curve[-1]
    share = last["step"] / steps
    before = max(scores[:-1], default=0.0)
    loss, train = (math.log(max(last[name] or 0.0, LOSS_FLOOR)) for name in ("validation_loss", "train_loss"))
    slope, trend = 0.0, 0.0
    if len(curve) > 1:
        earlier = curve[-2]
        doublings = math.log2(last["step"] / earlier["step"])
        slope = (loss - math.log(max(earlier["validation_loss"] or 0.0, LOSS_FLOOR))) / doublings
        trend = (best - before) / doublings
    state = np.array([share, best, trend, loss, slope, loss - train, untuned, best * (1 - share)])
    return Moment(state, 1 - share, best)


def moments(trials: Iterable[Trial]) -> list[Moment]:
    """Every moment before the end of the trials that ended well and are scored; the end is the measured test score."""
    found = []
    for trial in trials:
        end = trial.score or trial.validation
        rows = [
            r for r in trial.curve if r.get("validation_score") is not None and r.get("validation_loss") is not None
        ]
        if trial.status != "ok" or end is None or trial.untuned_score is None:
            continue
        untuned = trial.untuned_score.value
        final = gain(end.value, untuned)
        for count in range(1, len(rows) + 1):
            if rows[count - 1]["step"] < trial.budget:
                seen = moment(rows[:count], trial.budget, untuned)
                family = families().get(trial.task, trial.task)
                found.append(Moment(seen.state, seen.left, seen.best, family, final - seen.best))
    return found


class Extrapolation:
    """The process, conditioned on recorded moments. Equal moments give equal predictions."""

    def __init__(self, recorded: Sequence[Moment]):
        if len(recorded) > MOST:
            order = np.random.default_rng(0).permutation(len(recorded))[:MOST]
            recorded = [recorded[i] for i in sorted(order)]
        self.known = len(recorded) >= LEAST
        if not self.known:
            return
        states = np.array([m.state for m in recorded])
        self._centre, self._scale = states.mean(axis=0), np.maximum(states.std(axis=0), 1e-6)
        self._states = (states - self._centre) / self._scale
        self._left = np.array([m.left for m in recorded])
        rises = np.array([m.rise for m in recorded])
        self._middle, self._unit = float(rises.mean()), max(float(rises.std()), 1e-3)
        self._target = (rises - self._middle) / self._unit
        self._fit()

    def predict(self, at: Moment) -> tuple[float, float]:
        """Mean and standard deviation of the gain that will be measured at the end."""
        if not self.known:
            mean, deviation = BELIEVED
            return at.best + at.left * mean, max(0.05, math.sqrt(at.left) * deviation)
        state = ((at.state - self._centre) / self._scale)[None]
        across = self._kernel(self._states, state, self._logs)[:, 0]
        own = self._kernel(state, state, self._logs)[0, 0] + self._noise(np.array([at.left]), self._logs)[0]
        mean = float(across @ self._weights)
        variance = float(own - across @ self._inverse @ across)
        return at.best + self._middle + self._unit * mean, self._unit * math.sqrt(max(variance, 1e-4))

    def _kernel(self, left: np.ndarray, right: np.ndarray, logs: np.ndarray) -> np.ndarray:
        linear, wander, length = np.exp(logs[:3])
        distance = ((left[:, None] - right[None]) ** 2).sum(axis=2)
        alike = wander**2 * np.exp(-0.5 * distance / length**2)
        found: np.ndarray = alike + linear**2 * (1 + left @ right.T) / left.shape[1]
        return found

    @staticmethod
    def _noise(left: np.ndarray, logs: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.exp(2 * (logs[3] + (logs[4] - 1) * left))
        return found

    def _fit(self) -> None:
        """The deviations that make the recorded rises most probable, given the beliefs about them."""
        from scipy.linalg import cho_solve, cholesky
        from scipy.optimize import minimize

        from metapeft.meta.threads import one_thread

        def objective(logs: np.ndarray) -> float:
            total = self._kernel(self._states, self._states, logs) + np.diag(self._noise(self._left, logs) + 1e-6)
            root = cholesky(total, lower=True, check_finite=False)
            away = (logs - BELIEFS) / FREEDOM
            weights = cho_solve((root, True), self._target, check_finite=False)
            return float(0.5 * self._target @ weights + np.log(np.diag(root)).sum() + 0.5 * away @ away)

        with one_thread():
            bounds = [(b - 3, b + 3) for b in BELIEFS]
            found = minimize(objective, BELIEFS, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30})
            self._logs = found.x
            total = self._kernel(self._states, self._states, self._logs)
            total[np.diag_indices_from(total)] += self._noise(self._left, self._logs) + 1e-6
            self._inverse = np.linalg.inv(total)
        self._weights = self._inverse @ self._target
