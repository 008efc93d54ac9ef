"""What a training in progress, and everything it could be exchanged for, will come to.

Two opinions are joined. The meta-model knows the task, the configurations and the budgets, and gives all of them a
joint Gaussian before anything is trained. The learning curve gives the training in hand an opinion of its own
(`metapeft.switching.curves`). The two are averaged by their precisions, and what the training in hand is then believed
to come to reaches the alternatives through the covariance (Jeffrey's rule): a curve that ends low because the task is
hard lowers them all, one that ends low because of its configuration does not.

Both opinions stem from the same experience and err alike, so neither may be taken at its word: `caution` is the factor
by which the meta-model's deviation is enlarged before it is joined, `width` the one by which the outcome's is. Both are
chosen on families of tasks that were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metapeft.meta import gains
from metapeft.meta.evidence import Configuration, Known, Observation, families, key, without
from metapeft.meta.fitting import fit, folds
from metapeft.meta.model import Conditioned, Model, Places
from metapeft.meta.threads import one_thread
from metapeft.switching.curves import Extrapolation, moment, moments
from metapeft.training.trial import Trial

LEVEL, NORMAL = 0.9, 1.645  # of the intervals, and how many standard deviations that is
CAUTIONS = (1.0, 1.5, 2.0, 4.0, 8.0)
TRUST = 20  # moments that the belief in a width of 1 is worth


@dataclass(frozen=True)
class Joint:
    """Final gains, as they will be measured: mean (n,) and covariance (n, n)."""

    mean: np.ndarray
    covariance: np.ndarray

    def given(self, gain: float, deviation: float, caution: float = 1.0) -> Joint:
        """With the curve's opinion about the first of them."""
        mean, variance = joined(gain, deviation, self.mean[0], self.covariance[0, 0] ** 0.5, caution)
        weight = self.covariance[0] / self.covariance[0, 0]
        less = self.covariance[0, 0] - variance
        return Joint(self.mean + weight * (mean - self.mean[0]), self.covariance - less * np.outer(weight, weight))

    def wider(self, width: float) -> Joint:
        return Joint(self.mean, width**2 * self.covariance)


def joined(gain: float, deviation: float, believed: float, unsure: float, caution: float) -> tuple[float, float]:
    """Mean and variance of the curve's opinion (gain, deviation) and the meta-model's (believed, unsure) together."""
    mine, theirs = 1 / deviation**2, 1 / (caution * unsure) ** 2
    return (mine * gain + theirs * believed) / (mine + theirs), 1 / (mine + theirs)


@dataclass(frozen=True)
class Calibration:
    """See the module's text."""

    caution: float = 2.0
    width: float = 1.0


@dataclass(frozen=True)
class Checked:
    """A moment of a recorded trial, forecast by an experience without its family, and what was measured: the opinions
    of the curve and of the meta-model, as means and deviations of the gain."""

    family: str
    left: float  # share of the budget
    curve: tuple[float, float]
    model: tuple[float, float]
    measured: float

    def away(self, calibration: Calibration) -> float:
        """How many standard deviations the forecast was off."""
        mean, variance = joined(*self.curve, *self.model, calibration.caution)
        return (self.measured - mean) / (calibration.width * variance**0.5)


class Forecaster:
    """Forecasts for one task. `tests`: examples that the final score is measured on. `device`: where it is trained."""

    def __init__(
        self,
        here: Known,
        observations: Sequence[Observation],
        trials: Sequence[Trial],
        model: Model,
        untuned: float,
        tests: int,
        calibration: Calibration | None = None,
        device: str = "",
    ):
        self.here, self.untuned, self.tests, self.device = here, untuned, tests, device
        self.calibration = calibration or Calibration()
        self._curves = Extrapolation(moments(trials))
        with one_thread():
            self._known = Conditioned(model, observations)

    def before(self, options: Sequence[tuple[Configuration, int]]) -> Joint:
        """What the meta-model expects of (configuration, steps), before any of them is trained."""
        places = Places.of([(self.here, key(c), c, steps, self.device) for c, steps in options])
        with one_thread():
            return measured(self._known.model, *self._known.at(places), self.untuned, self.tests)

    def ahead(self, curve: Sequence[dict[str, float]], steps: int) -> tuple[float, float]:
        """What the curve alone says about its end: mean and deviation of the gain."""
        return self._curves.predict(moment(curve, steps, self.untuned))


def measured(model: Model, mean: np.ndarray, covariance: np.ndarray, untuned: float, tests: int) -> Joint:
    """From latent gains to measured ones: as wide as left-out tasks showed, with a training's luck and the test's."""
    n = len(mean)
    level = np.full((n, n), 1 / n)
    scale = model.level_scale * level + model.choice_scale * (np.eye(n) - level)
    expected = gains.score(mean, np.clip(untuned, 0, 1))
    luck = model.deviations["seed"] ** 2 + expected * (1 - expected) / max(1, tests) / gains.room(untuned) ** 2
    return Joint(mean, scale @ covariance @ scale.T + np.diag(luck))


def left_out(trials: Sequence[Trial], observations: Sequence[Observation], model: Model | None = None) -> list[Checked]:
    """Every moment of every recorded trial, forecast by an experience without its family (a fifth of them at a time).

    model: the meta-model's variances; None fits them to the other families each time, as a judge must.
    """
    tasks = {(o.task.version, o.task.backbone): o.task for o in observations}
    recorded = [t for t in trials if t.untuned_score is not None and (t.task_version, t.backbone) in tasks]
    found = []
    for part in folds(observations):
        others = without(observations, part)
        rest = [t for t in recorded if families().get(t.task, t.task) not in part]
        if not others or not rest:
            continue
        curves, conditioned = Extrapolation(moments(rest)), Conditioned(model or fit(others), others)
        for trial in recorded:
            if families().get(trial.task, trial.task) in part:
                found += _checked(trial, tasks[trial.task_version, trial.backbone], curves, conditioned)
    return found


def _checked(trial: Trial, task: Known, curves: Extrapolation, known: Conditioned) -> list[Checked]:
    assert trial.untuned_score is not None
    seen = moments([trial])
    if not seen:
        return []
    places = Places.of([(task, key(trial.configuration), trial.configuration, trial.budget, trial.device)])
    tests = trial.score.n if trial.score else 0
    before = measured(known.model, *known.at(places), trial.untuned_score.value, tests)
    model = float(before.mean[0]), float(before.covariance[0, 0]) ** 0.5
    return [Checked(m.family, m.left, curves.predict(m), model, m.best + m.rise) for m in seen]


def calibrated(checked: Sequence[Checked], level: float = LEVEL) -> Calibration:
    """What makes forecasts best, and their intervals cover `level` of them; beliefs count as TRUST moments."""
    if not checked:
        return Calibration()

    def off(caution: float) -> float:
        errors = [c.measured - joined(*c.curve, *c.model, caution)[0] for c in checked]
        return float(np.mean(np.square(errors)))

    caution = min(CAUTIONS, key=off)
    away = np.abs([c.away(Calibration(caution)) for c in checked])
    factor = max(1e-3, float(np.quantile(away, level)) / NORMAL)
    return Calibration(caution, float(factor ** (len(away) / (len(away) + TRUST))))


def cross_checked(checked: Sequence[Checked]) -> list[tuple[Checked, float]]:
    """Each with how far off it was, by the calibration that the other families ask for."""
    found = []
    for family in sorted({c.family for c in checked}):
        chosen = calibrated([c for c in checked if c.family != family])
        found += [(c, c.away(chosen)) for c in checked if c.family == family]
    return found


def coverage(away: Sequence[float]) -> float:
    """Share within the interval."""
    return float(np.mean(np.abs(away) <= NORMAL)) if len(away) else float("nan")
