"""What would retraining gain? The regret of the advice that was given, less the regret of a model that is fitted anew.

Judged on the decisions since the advice became worse, each task left out of what the new model is fitted to (with its
family, as everywhere): what it would have chosen among the configurations that were tried there, against what was
chosen. The other recent tasks are known to it: that is what retraining adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from metapeft.meta.evidence import Known, Observation, key, without
from metapeft.meta.fitting import fit, folds
from metapeft.meta.forecast import forecast, untuned_of
from metapeft.meta.model import Conditioned, Model
from metapeft.meta.threads import one_thread
from metapeft.monitoring.outcomes import Decision

LEAST = 5  # tasks


@dataclass(frozen=True)
class Benefit:
    """In points of score: mean over tasks, and the standard error of the difference."""

    tasks: int
    now: float = 0.0
    refitted: float = 0.0
    error: float = 0.0

    @property
    def gain(self) -> float:
        return self.now - self.refitted

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain}

    def said(self) -> str:
        now, new = 100 * self.now, 100 * self.refitted
        return (
            f"Expected of fitting anew, judged on {self.tasks} of these tasks left out: regret {now:.1f} → {new:.1f}"
            f" points, a gain of {100 * self.gain:.1f} ± {100 * self.error:.1f}."
        )


def benefit(
    decisions: Sequence[Decision],
    observations: Sequence[Observation],
    chosen: dict[str, str],
    fitted: Callable[[Sequence[Observation]], Model] = fit,
) -> Benefit:
    """decisions: those since the advice got worse. chosen: decision -> key of its first choice. Minutes: it fits."""
    wanted = {(d.task_version, d.backbone): d for d in decisions if d.regret is not None}
    tables: dict[tuple[str, str, int, str], list[Observation]] = {}
    for o in observations:
        if (o.task.version, o.task.backbone) in wanted and math.isfinite(o.score):
            tables.setdefault((o.task.version, o.task.backbone, o.steps, o.device), []).append(o)
    asked = []
    for (version, backbone, _, _), table in tables.items():
        first = chosen.get(wanted[version, backbone].id)
        if len(table) > 1 and any(o.key == first for o in table):
            asked.append((table, first))
    if len({table[0].task for table, _ in asked}) < LEAST:
        return Benefit(0)
    pairs: dict[Known, list[tuple[float, float]]] = {}
    with one_thread():
        for part in folds([o for table, _ in asked for o in table]):
            known = without(observations, part)
            model = fitted(known)
            conditioned = Conditioned(model, known)
            for table, first in asked:
                if table[0].task.family not in part:
                    continue
                scores = np.array([o.score for o in table])
                tests = max(o.tests for o in table) or 300
                configurations = [o.configuration for o in table]
                here = table[0]
                told = forecast(
                    conditioned, here.task, configurations, here.steps, untuned_of(table), tests, device=here.device
                )
                now = float(scores.max() - next(o.score for o in table if o.key == first))
                pairs.setdefault(here.task, []).append((now, float(scores.max() - scores[int(told.mean.argmax())])))
    now, new = np.array([np.mean(own, axis=0) for own in pairs.values()]).T
    error = float((now - new).std(ddof=1) / math.sqrt(len(now)))
    return Benefit(len(pairs), float(now.mean()), float(new.mean()), error)


def first_choices(entries: Sequence[dict]) -> dict[str, str]:  # type: ignore[type-arg]
    """Decision -> key of the configuration that was recommended first."""
    return {e["id"]: key(next(r["configuration"] for r in e["recommendations"] if r["rank"] == 1)) for e in entries}
