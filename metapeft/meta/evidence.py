"""Trials as the meta-model sees them: gains of configurations on tasks, and what is known of those tasks.

A gain is a score between the untuned backbone's (0) and everything right (1), or everything lost (-1), so that easy and
hard tasks can be compared. Repetitions with other seeds are averaged. What says nothing about quality (a trial that ran
out of memory or was never scored) is left out; a diverged training leaves the backbone untuned: gain 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from metapeft.meta.gains import gain, room
from metapeft.meta.unfinished import Remaining, fraction
from metapeft.peft import METHODS
from metapeft.profiling.profiles import SCALES
from metapeft.training.configuration import full
from metapeft.training.trial import Score, Trial

FEATURES = ("hint", *SCALES)

Configuration = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """A task as one backbone sees it. `features`: its profile's, None when it was never profiled.

    metric: what it is scored by ("" where no trial says); by another one it is another task.
    """

    version: str
    backbone: str
    name: str = field(compare=False)
    family: str = field(compare=False)  # tasks that resemble each other by construction
    train_examples: int = field(compare=False)
    features: dict[str, float] | None = field(default=None, compare=False)
    metric: str = ""

    @cached_property
    def vector(self) -> np.ndarray:
        """The features called FEATURES on a common scale, within 4 usual spreads of the usual middle; without a
        profile, zeros."""
        if self.features is None:
            return np.zeros(len(FEATURES))
        scaled = [(change(self.features[n]) - centre) / scale for n, (change, centre, scale) in SCALES.items()]
        return np.clip([self.hint, *scaled], -4, 4)

    @cached_property
    def hint(self) -> float:
        """The gain that needs no tuning: by a linear probe on frozen features, or by always naming the commonest label.
        0 where neither is known."""
        if self.features is None or not self.features["classification"]:
            return 0.0
        reached = max(self.features["probe_accuracy"], self.features["majority_share"])
        return gain(reached, self.features["zero_shot_score"])


@dataclass(frozen=True)
class Observation:
    """The gain of a configuration on a task, the mean of `repeats` trainings with different seeds.

    The gain is that on the test and the validation split together, `error` the standard error that their size gives it;
    `score` is the mean test score alone, and `validation` the mean score on the validation split, where there is one.
    """

    task: Known
    configuration: Configuration  # all hyperparameters
    steps: int
    gain: float
    error: float
    repeats: int = 1
    score: float = math.nan
    validation: float = math.nan
    loss: float = math.nan
    tests: int = 0  # examples of the test split
    between: float = math.nan  # variance of the test score between the repeats
    status: str = "ok"
    device: str = ""  # that it was measured on: "cpu", "metal" or "cuda"
    untuned: float = math.nan  # the backbone's own score, what gains are measured from

    @cached_property
    def key(self) -> str:
        return key(self.configuration)

    @cached_property
    def id(self) -> str:
        """12 hex digits that the same work always has, whatever came of it."""
        work = f"{self.task.version} {self.task.backbone} {self.steps} {self.key}"
        # What is not named is as in the experience that ships, whose ids are older than the rest.
        work += f" {self.device}" if self.device not in ("", "cpu") else ""
        work += f" {self.task.metric}" if self.task.metric == "macro_f1" else ""
        return hashlib.sha256(work.encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Configuration]:
    return {method: full({"method": method}) for method in METHODS}


def complete(configuration: Configuration) -> Configuration:
    """With every default written out; unlike `full` it trusts the values, which is hundreds of times faster."""
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in configuration.items()}
    return _defaults()[configuration["method"]] | given


def plain(configuration: Configuration) -> Configuration:
    """`complete`, with the usual number of evaluations: it follows from the steps and says nothing about quality."""
    usual = _defaults()[configuration["method"]]["evaluations"]
    return complete(configuration) | {"evaluations": usual}


def key(configuration: Configuration) -> str:
    """Equal for configurations that train alike, however often they are looked at."""
    return json.dumps(plain(configuration), sort_keys=True)


def gather(
    trials: Iterable[Trial],
    features: Mapping[tuple[str, str], dict[str, float]],
    untuned: Mapping[tuple[str, str], float] | None = None,
    remaining: Remaining | None = None,
) -> list[Observation]:
    """One observation per (task, metric, backbone, configuration, steps, device), in an order that the trials' order
    does not change.

    features: by (task version, backbone). untuned: scores of the untuned backbone, likewise, for trials that do not
    carry their own. remaining: what trials that were stopped would have gained still.
    """
    remaining = remaining or Remaining()
    groups: dict[tuple[Any, ...], list[tuple[Trial, float]]] = {}
    for trial in trials:
        place = (trial.task_version, trial.backbone)
        base = trial.untuned_score.value if trial.untuned_score else (untuned or {}).get(place)
        measured = trial.score or trial.validation
        useful = trial.status == "diverged" or (trial.status in ("ok", "stopped") and _finite(measured))
        if trial.method in METHODS and useful and base is not None and math.isfinite(base):
            work = (key(trial.configuration), trial.budget, trial.device, metric(trial))
            groups.setdefault((*place, *work), []).append((trial, base))
    tasks: dict[tuple[str, str, str], Known] = {}
    found = []
    for (version, backbone, _, steps, _, by), group in sorted(groups.items(), key=lambda item: item[0]):
        group.sort(key=lambda member: (member[0].seed, member[0].id))
        first = group[0][0]
        task = tasks.setdefault(
            (version, backbone, by),
            Known(
                version,
                backbone,
                first.task,
                families().get(first.task, first.task),
                max(t.train_examples for t, _ in group),
                features.get((version, backbone)),
                by,
            ),
        )
        found.append(_averaged(task, steps, group, remaining))
    return found


def metric(trial: Trial) -> str:
    """What a trial was scored by."""
    measured = trial.score or trial.validation or trial.untuned_score
    return measured.metric if measured else ""


def _averaged(task: Known, steps: int, group: Sequence[tuple[Trial, float]], remaining: Remaining) -> Observation:
    gains, errors, scores, validations, losses = [], [], [], [], []
    for trial, base in group:
        measured = _both(trial)
        lost = trial.status == "diverged" or measured is None
        value = base if lost or measured is None else measured.value
        error = 0.0 if lost or measured is None else measured.standard_error
        more, unsure = remaining.at(fraction(trial)) if trial.status == "stopped" else (0.0, 0.0)
        gains.append(min(1.0, gain(value, base) + more))
        errors.append(math.hypot(error / room(base, value >= base), unsure))
        if lost:
            scores.append(base)
        elif trial.score is not None:
            scores.append(trial.score.value)
        if trial.validation is not None and not lost:
            validations.append(trial.validation.value)
        if measured is not None and not lost:
            losses.append(measured.loss)
    return Observation(
        task=task,
        configuration=complete(group[0][0].configuration),
        steps=steps,
        gain=float(np.mean(gains)),
        error=float(np.mean(errors)),
        repeats=len(group),
        score=float(np.mean(scores)) if scores else math.nan,
        validation=float(np.mean(validations)) if validations else math.nan,
        loss=float(np.mean(losses)) if losses else math.nan,
        tests=max((t.score.n for t, _ in group if t.score), default=0),
        between=float(np.var(scores, ddof=1)) if len(scores) > 1 else math.nan,
        status=group[0][0].status,
        device=group[0][0].device,
        untuned=group[0][1],
    )


def _both(trial: Trial) -> Score | None:
    """Test and validation split as one: more examples say more, where no choice among configurations is judged."""
    test, held = trial.score, trial.validation
    if test is None or held is None or not _finite(held) or test.n <= 0 or held.n <= 0:
        return test or held
    n = test.n + held.n

    def mean(a: float, b: float) -> float:
        return (test.n * a + held.n * b) / n

    error = math.hypot(test.n * test.standard_error, held.n * held.standard_error) / n
    return Score(test.metric, mean(test.value, held.value), error, n, mean(test.loss, held.loss))


def _finite(measured: Score | None) -> bool:
    return measured is not None and math.isfinite(measured.value) and math.isfinite(measured.standard_error)


@lru_cache(maxsize=1)
def families() -> dict[str, str]:
    """Catalog name -> family."""
    from metapeft.data import catalog

    return {entry.name: entry.family for entry in catalog.entries()}


def without(observations: Sequence[Observation], families: set[str]) -> list[Observation]:
    return [o for o in observations if o.task.family not in families]
