"""Fitting the meta-model to the experience: `fit(observations) -> Model`.

The metric and the deviations come from all observations. How far similar tasks may teach, and by how much the
uncertainty is too small, come from families of tasks that were left out: five times, a fifth of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from metapeft.meta.embedding import Metric, learn
from metapeft.meta.evidence import Known, Observation, without
from metapeft.meta.forecast import CLOSE, drawn, log_odds, tests_of, untuned_of
from metapeft.meta.model import FREEDOM, Conditioned, Model, Places, fit_deviations, noise, terms
from metapeft.meta.threads import one_thread

FOLDS = 5
LEAST_TASKS = 5  # tasks with at least LEAST_TRIED configurations before anything is fitted
LEAST_TRIED = 3
REACHES = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (0.7, 1.4)
CHOICES = 4  # independent answers that the configurations of one task are worth, for they stand or fall together
NOMINAL = 5  # tasks on which the uncertainty is believed to have been right, before any was checked

Group = list[Observation]
Predicted = tuple[Group, np.ndarray, np.ndarray]


def fit(observations: Sequence[Observation]) -> Model:
    """The beliefs themselves when there are too few tasks, or all are of one family."""
    found = groups(observations)
    if len(found) < LEAST_TASKS or len({group[0].task.family for group in found}) < 2:
        return Model()
    with one_thread():
        model = fit_deviations(observations, Model(metric=learn(observations), reach=1.0))
        splits = [split for part in folds(observations) if (split := Split.of(observations, part)).asked]
        return _with_chances(_calibrated(_reaching(model, splits), splits), splits)


def groups(observations: Sequence[Observation], least: int = LEAST_TRIED) -> list[Group]:
    """What can be compared: the scored observations of one task at one budget on one device, where there are at least
    `least`."""
    found: dict[tuple[Known, int, str], Group] = {}
    for o in observations:
        if math.isfinite(o.score):
            found.setdefault((o.task, o.steps, o.device), []).append(o)
    return [group for group in found.values() if len(group) >= least]


def folds(observations: Sequence[Observation]) -> list[set[str]]:
    """Families in FOLDS parts, the largest first to the emptiest; a new family does not change much."""
    sizes: dict[str, int] = {}
    for o in observations:
        sizes[o.task.family] = sizes.get(o.task.family, 0) + 1
    parts: list[set[str]] = [set() for _ in range(min(FOLDS, len(sizes)))]
    filled = [0] * len(parts)
    for family in sorted(sizes, key=lambda f: (-sizes[f], hashlib.sha256(f.encode()).hexdigest())):
        emptiest = filled.index(min(filled))
        parts[emptiest].add(family)
        filled[emptiest] += sizes[family]
    return [part for part in parts if part]


@dataclass(frozen=True)
class Split:
    """Families left out, and what is known without them."""

    known: list[Observation]
    asked: list[Group]
    metric: Metric

    @classmethod
    def of(cls, observations: Sequence[Observation], families: set[str]) -> Split:
        known = without(observations, families)
        return cls(known, groups([o for o in observations if o.task.family in families]), learn(known))

    def predict(self, models: Sequence[Model]) -> Iterator[list[Predicted]]:
        """For each of the models, which share their length: every group with the mean and covariance of its gains, from
        the other families alone, by the metric that those families taught."""
        points = [o for group in self.asked for o in group]
        here, there = Places.seen(points), Places.seen(self.known)
        shared = replace(models[0], metric=self.metric)
        evidence, inside, across = (terms(shared, *s) for s in ((there, there), (here, here), (there, here)))
        for model in models:
            mean, covariance = Conditioned(model, self.known, evidence).at(here, inside, across)
            found, start = [], 0
            for group in self.asked:
                own = slice(start, start := start + len(group))
                found.append((group, mean[own], covariance[own, own]))
            yield found


def _reaching(model: Model, splits: list[Split]) -> Model:
    """With the mean of the choices of reach and length, each weighted by how surely tasks left out say that it is worse
    than the best: a mean varies less from one state of the experience to the next than the best does."""
    choices = [replace(model, reach=reach, length=length) for length in LENGTHS for reach in REACHES]
    losses = np.concatenate([_losses(choices, split) for split in splits], axis=1)
    worse = losses - losses[losses.mean(axis=1).argmin()]
    error = standard_errors(worse, [group[0].task.family for split in splits for group in split.asked])
    weights = np.exp(-0.5 * (worse.mean(axis=1) / np.maximum(error, 1e-12)) ** 2)
    weights /= weights.sum()
    reach = weights @ [choice.reach for choice in choices]
    length = np.exp(weights @ np.log([choice.length for choice in choices]))
    return replace(model, reach=float(reach), length=float(length))


def standard_errors(values: np.ndarray, families: list[str]) -> np.ndarray:
    """Of the mean of each row. Tasks of a family are no independent witnesses: families are (cluster-robust)."""
    away = values - values.mean(axis=1, keepdims=True)
    sums = [away[:, [i for i, f in enumerate(families) if f == family]].sum(axis=1) for family in sorted(set(families))]
    found: np.ndarray = np.sqrt(np.sum(np.square(sums), axis=0)) / values.shape[1]
    return found


def _losses(models: Sequence[Model], split: Split) -> np.ndarray:
    """(models, groups): the mean squared error of the differences between the configurations of a task left out."""
    rows = []
    for length in LENGTHS:
        for predicted in split.predict([m for m in models if m.length == length]):
            rows.append([float(np.var(np.array([o.gain for o in group]) - mean)) for group, mean, _ in predicted])
    return np.array(rows).reshape(len(models), len(split.asked))


def _calibrated(model: Model, splits: list[Split]) -> Model:
    levels, choices = [], []
    families = {group[0].task.family for split in splits for group in split.asked}
    for group, mean, covariance in (found for split in splits for found in next(split.predict([model]))):
        covariance = covariance + np.diag(noise(model, group))
        error = np.array([o.gain for o in group]) - mean
        centre = np.eye(len(group)) - 1 / len(group)
        choices.append(np.abs(centre @ error) / np.sqrt(np.maximum(np.diag(centre @ covariance @ centre), 1e-9)))
        levels.append(np.array([abs(error.mean()) / math.sqrt(max(covariance.mean(), 1e-9))]))
    return replace(model, level_scale=_scale(levels, len(families)), choice_scale=_scale(choices, len(families)))


def _with_chances(model: Model, splits: list[Split]) -> Model:
    """The model with the intercept and slope that make its P(within 1 %) come true on tasks left out (Platt 1999, with
    a normal prior around no change)."""
    from scipy.optimize import minimize

    told, came = [], []
    for group, mean, covariance in (found for split in splits for found in next(split.predict([model]))):
        seen = np.array([o.score for o in group])
        told.append(log_odds(drawn(model, mean, covariance, untuned_of(group), tests_of(group)).p_within))
        came.append(seen >= seen.max() - CLOSE)
    odds, happened = np.concatenate(told), np.concatenate(came)
    weight = np.concatenate([np.full(len(t), CHOICES / len(t)) for t in told])

    def loss(values: np.ndarray) -> float:
        leaning = (values[0] + np.exp(values[1]) * odds) * np.where(happened, -1, 1)
        return float(weight @ np.logaddexp(0, leaning) + 0.5 * (values @ values) / FREEDOM**2)

    intercept, slope = minimize(loss, np.zeros(2), method="L-BFGS-B").x
    return replace(model, within=(float(intercept), float(np.exp(slope))))


def _scale(surprises: list[np.ndarray], families: int) -> float:
    """By how much standard deviations must grow for 80 and 90 % intervals to hold what they promise. Every task counts
    alike, and so do NOMINAL tasks on which they did. surprises: errors in standard deviations, one array per task.

    The next family is one more, and may surprise more than all before: so the quantile is that of conformal prediction
    (Vovk et al. 2005; for groups Dunn, Wasserman and Ramdas 2023), higher by one part in as many families."""
    normal = NormalDist()
    nominal = np.array([normal.inv_cdf((1 + p / 100) / 2) for p in range(1, 100)])
    every = [*surprises, *([nominal] * NOMINAL)]
    values, weights = np.concatenate(every), np.concatenate([np.full(len(s), 1 / len(s)) for s in every])
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    raised = {level: level * (1 + 1 / (families + NOMINAL)) for level in (0.8, 0.9)}
    at = {n: values[order][min(len(values) - 1, int(np.searchsorted(share, level)))] for n, level in raised.items()}
    ratios = [max(1e-3, value) / normal.inv_cdf((1 + level) / 2) for level, value in at.items()]
    return float(np.exp(np.mean(np.log(ratios))))
