"""Histories of decisions of the real selector on synthetic tasks with a known truth, with and without a degradation.

A `Selector` is what metapeft is after `metapeft meta train`: a fitted model and the experience. `Selector.history`
lets it recommend for one new task after another; each recommendation is followed by trials, and both become what
metapeft writes (a line of decisions.jsonl, trials), so that what is watched goes through the product's own joining.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.synthetic import BACKBONE, CONFIGURATIONS, Kind, Nature, World, trial
from metapeft.meta.evidence import Known, Observation, complete, gather
from metapeft.meta.forecast import forecast
from metapeft.meta.model import Conditioned, Model
from metapeft.meta.teacher import taught
from metapeft.meta.threads import one_thread
from metapeft.monitoring.drift import scaled
from metapeft.training.trial import Trial

STEPS, TESTS, SECONDS = 40, 300, 60.0
COMPLETE = [complete(c) for c in CONFIGURATIONS]
Corrupt = Callable[[dict[str, float], np.random.Generator], dict[str, float]]


@dataclass(frozen=True)
class Device:
    """What trials run on, and how many times the usual seconds they take there."""

    kind: str = "cpu"
    slower: float = 1.0


CPU = Device()


@dataclass
class Step:
    """One decision: what was written, what followed, and what is true of it. features: what is kept as its task's
    profile; own: what the task measures like."""

    entry: dict[str, Any]
    trials: list[Trial]
    features: dict[str, float]
    own: dict[str, float]
    vector: np.ndarray
    true_regret: float
    family: str


@dataclass
class Selector:
    """A fitted model, what it was fitted to, and what it predicts from."""

    model: Model
    observations: list[Observation]
    world: World
    number: int = 1
    _conditioned: Conditioned | None = field(default=None, repr=False)

    def conditioned(self) -> Conditioned:
        if self._conditioned is None:
            with one_thread():
                self._conditioned = Conditioned(self.model, self.observations)
        return self._conditioned

    def history(
        self,
        random: np.random.Generator,
        nature: Nature,
        length: int,
        families: Sequence[str],
        follow: Callable[[np.random.Generator, int], list[int]],
        corrupt: Corrupt | None = None,
        start: int = 0,
        device: Device = CPU,
    ) -> list[Step]:
        """follow: ranks (0 the first) of the configurations that are then tried. start: number of the first decision,
        which its time and the names of tasks come from."""
        found = []
        for number in range(start, start + length):
            family = families[int(random.integers(len(families)))]
            task = nature.task(random, f"{family}_{number}", nature.kinds[family])
            seen = task.features if corrupt is None else corrupt(dict(task.features), random)
            found.append(self._step(random, number, family, task, seen, follow, device))
        return found

    def _step(
        self,
        random: np.random.Generator,
        number: int,
        family: str,
        task: Kind,
        features: dict[str, float],
        follow: Callable[[np.random.Generator, int], list[int]],
        device: Device,
    ) -> Step:
        here = Known(task.version, BACKBONE, task.name, family, 1000, features)
        untuned = (features["zero_shot_score"], features["zero_shot_standard_error"])
        with one_thread():
            told = forecast(self.conditioned(), here, COMPLETE, STEPS, untuned, TESTS, number, device.kind)
        order = np.argsort(-told.mean, kind="stable")
        low, high = told.interval(0.9)
        recommended = [
            {
                "rank": rank,
                "method": CONFIGURATIONS[i]["method"],
                "configuration": CONFIGURATIONS[i],
                "score": {"mean": float(told.mean[i]), "low": float(low[i]), "high": float(high[i]), "level": 0.9},
                "p_within_1pct": float(told.p_within[i]),
                "seconds": SECONDS,
            }
            for rank, i in enumerate(order, 1)
        ]
        entry = {
            "id": f"{number:016x}", "at": moment(number), "task": task.name, "task_version": task.version,
            "backbone": BACKBONE, "model": self.number, "steps": STEPS, "recommendations": recommended,
            "neighbours": [],
        }  # fmt: skip
        tried = [int(order[rank]) for rank in follow(random, len(order))]
        trials = [trial(random, task, index, tests=TESTS, started=moment(number)) for index in tried]
        for one in trials:  # seconds vary by a quarter or so
            one.device = device.kind
            one.seconds = SECONDS * device.slower * float(np.exp(0.25 * random.normal()))
        regret = float(task.truth.max() - task.truth[order[0]])
        return Step(entry, trials, features, task.features, scaled(features), regret, family)

    def learned(self, steps: Sequence[Step]) -> list[Observation]:
        """The experience once the trials of these decisions are in it."""
        features = {(s.entry["task_version"], BACKBONE): s.features for s in steps}
        families = {s.entry["task_version"]: s.family for s in steps}
        new = taught(gather([t for s in steps for t in s.trials], features))
        new = [replace(o, task=replace(o.task, family=families[o.task.version])) for o in new]
        return [*self.observations, *new]


def moment(number: int) -> str:
    """Decisions come hourly."""
    day, hour = divmod(number, 24)
    month, day = divmod(day, 28)
    year, month = divmod(month, 12)
    return f"{2030 + year}-{month + 1:02d}-{day + 1:02d}T{hour:02d}:00:00+00:00"


def swept(trials: int) -> Callable[[np.random.Generator, int], list[int]]:
    """A sweep: the first three of the list, and others from all over it."""

    def follow(random: np.random.Generator, length: int) -> list[int]:
        first = list(range(min(3, length)))
        others = random.permutation(np.arange(len(first), length))[: max(0, trials - len(first))]
        return [*first, *(int(i) for i in others)]

    return follow


def shadowed(every: float) -> Callable[[np.random.Generator, int], list[int]]:
    """The first choice is trained, and in a share of the decisions the runner-up beside it."""

    def follow(random: np.random.Generator, length: int) -> list[int]:
        return [0, 1] if random.random() < every else [0]

    return follow


def true_regret(steps: Sequence[Step]) -> tuple[float, float]:
    """Mean and its standard error."""
    values = np.array([s.true_regret for s in steps])
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
