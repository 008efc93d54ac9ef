"""Which hyperparameters mattered: the share of the differences between scores that each explains.

For the method, the groups are the methods; for a hyperparameter of a method, thirds of its values (or the values, where
there are few), within the method's trials. The share is ω² (Hays 1963): between-group variance less what chance alone
would give, so that a hyperparameter that does nothing gets about 0 even with few trials. Main effects only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metapeft.search import pareto
from metapeft.training.trial import Trial

LEAST = 6  # trials of a method before its hyperparameters are judged


@dataclass(frozen=True)
class Importance:
    """`name` is "method" or a hyperparameter of `method`; `share` of the variance of the score, in [0, 1].

    `best` says where the best group lies: its values, as text.
    """

    name: str
    method: str
    share: float
    trials: int
    best: str


def importance(trials: Sequence[Trial]) -> list[Importance]:
    """Most important first within the method choice, then each method. A diverged trial counts as untuned."""
    known = [(t, value) for t in pareto.averaged(trials) if (value := _value(t)) is not None]
    found: list[Importance] = []
    methods = sorted({t.method for t, _ in known})
    if len(methods) > 1 and len(known) >= LEAST:
        share, best = _explained([t.method for t, _ in known], [v for _, v in known])
        found.append(Importance("method", "", share, len(known), best))
    for method in methods:
        mine = [(t, v) for t, v in known if t.method == method]
        if len(mine) < LEAST:
            continue
        rows = []
        for name in pareto.searched(method):
            values = [t.configuration.get(name) for t, _ in mine]
            if len({json.dumps(v) for v in values}) > 1:
                share, best = _explained(_grouped(values), [v for _, v in mine])
                rows.append(Importance(name, method, share, len(mine), best))
        found += sorted(rows, key=lambda row: -row.share)
    return found


def _value(trial: Trial) -> float | None:
    point = pareto.objectives(trial)
    if point is not None:
        return point[0]
    return trial.untuned_score.value if trial.status == "diverged" and trial.untuned_score else None


def _grouped(values: Sequence[Any]) -> list[str]:
    """The value itself where there are at most four; else which third of the sorted values it lies in."""
    labels = [json.dumps(value) for value in values]
    if len(set(labels)) <= 4 or not all(isinstance(value, int | float) for value in values):
        return labels
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    names = (f"≤ {low:.3g}", f"{low:.3g} to {high:.3g}", f"> {high:.3g}")
    return [names[int(value > low) + int(value > high)] for value in values]


def _explained(groups: Sequence[str], scores: Sequence[float]) -> tuple[float, str]:
    """(ω² in [0, 1], the group with the highest mean). 0 where the groups hold fewer than two on average."""
    by_group: dict[str, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        by_group.setdefault(group, []).append(score)
    best = max(by_group, key=lambda group: float(np.mean(by_group[group]))).strip('"')
    total = float(np.sum((np.array(scores) - np.mean(scores)) ** 2))
    within = sum(float(np.sum((np.array(v) - np.mean(v)) ** 2)) for v in by_group.values())
    freedom = len(scores) - len(by_group)
    if freedom < len(by_group) or not total > 0 or not math.isfinite(total):
        return 0.0, best
    mean_within = within / freedom
    share = (total - within - (len(by_group) - 1) * mean_within) / (total + mean_within)
    return min(1.0, max(0.0, share)), best
