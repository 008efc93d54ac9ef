"""What is believed about gains, before and after evidence: one linear Gaussian model over (task, configuration).

    gain = portfolio's belief + overall + task + method + configuration + task x method + task x configuration + noise

Each term is a zero-mean Gaussian; the configuration terms are shared between configurations of a method the more, the
closer their learning rates and the fewer hyperparameters differ. Conditioning on trials (Rasmussen and Williams 2006,
eq. 2.23-2.24) takes out each task's own level and shrinks every effect towards the prior: with one configuration tried
once little moves, with many tasks the order becomes that of the task-centred averages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from metapeft.meta.portfolio import PORTFOLIO
from metapeft.peft import METHODS
from metapeft.training.configuration import full

# Standard deviations of the terms, in gain. Beliefs, chosen wide: tasks differ much more than methods do.
OVERALL, TASK, METHOD, CONFIGURATION, TASK_METHOD, TASK_CONFIGURATION = 0.2, 0.3, 0.1, 0.15, 0.15, 0.15
HINT = 0.2  # how far the best that frozen features tell may lie from what tuning reaches
SEED = 0.05  # the same training with another seed
DOUBLING = 0.05  # a budget twice as large or small
RATE_STEP = math.log(3.0)  # learning rates a factor of 3 apart share 60 % of their variance
DIFFERENT = 0.6  # what configurations that differ in one more hyperparameter still share
UNIMPORTANT = frozenset({"method", "learning_rate", "evaluations", "patience", "checkpoint", "accumulate", "clip"})
FLOOR = 0.05  # of a range: keeps gains finite where the backbone is nearly perfect already (or nearly always wrong)


@lru_cache(maxsize=1)
def _defaults() -> dict[str, dict[str, Any]]:
    return {method: full({"method": method}) for method in METHODS}


def complete(configuration: dict[str, Any]) -> dict[str, Any]:
    """With every default written out; unlike `full` it trusts the values, which is hundreds of times faster."""
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in configuration.items()}
    return _defaults()[configuration["method"]] | given


def key(configuration: dict[str, Any]) -> str:
    """Equal for configurations that train alike."""
    return json.dumps(complete(configuration), sort_keys=True)


@dataclass(frozen=True)
class Observation:
    """A gain measured on a task (any hashable name), with the standard deviation of what it does not depend on."""

    task: str
    configuration: dict[str, Any]  # all hyperparameters; empty: of the task as such, not of one configuration
    gain: float
    noise: float


def gain(score: float, untuned: float) -> float:
    """The share of the untuned backbone's errors that are gone, or (below 0) of its hits that are lost; in [-1, 1]."""
    change = score - untuned
    return min(1.0, max(-1.0, change / max(FLOOR, 1 - untuned if change >= 0 else untuned)))


def score(gains: np.ndarray, untuned: np.ndarray) -> np.ndarray:
    """The inverse of `gain`, in [0, 1]."""
    up = np.clip(gains, 0, 1) * np.maximum(FLOOR, 1 - untuned)
    down = np.clip(-gains, 0, 1) * np.maximum(FLOOR, untuned)
    clipped: np.ndarray = np.clip(untuned + up - down, 0, 1)
    return clipped


def posterior(
    task: str, candidates: Sequence[dict[str, Any]], observations: Sequence[Observation]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (n,) and covariance (n, n) of the candidates' gains on a task. Candidates hold all hyperparameters."""
    own = [(task, c) for c in candidates]
    prior = np.array([expected(c) for c in candidates])
    covariance = _covariance(own, own)
    if not observations:
        return prior, covariance
    seen = [(o.task, o.configuration) for o in observations]
    known = _covariance(seen, seen) + np.diag([o.noise**2 for o in observations])
    across = _covariance(own, seen)
    solved = np.linalg.solve(known, across.T)
    surprise = np.array([o.gain - expected(o.configuration) for o in observations])
    return prior + solved.T @ surprise, covariance - across @ solved


def expected(configuration: dict[str, Any]) -> float:
    """The portfolio's belief for the entry of the same method with the nearest learning rate (empty: for all)."""
    if not configuration:
        return float(np.mean([d.gain for d in PORTFOLIO]))
    rate = math.log(configuration["learning_rate"])
    same = [d for d in PORTFOLIO if d.configuration["method"] == configuration["method"]]
    return min(same, key=lambda d: abs(math.log(d.configuration["learning_rate"]) - rate)).gain


def _covariance(left: list[tuple[str, dict[str, Any]]], right: list[tuple[str, dict[str, Any]]]) -> np.ndarray:
    tasks = _same([t for t, _ in left], [t for t, _ in right])
    ours, theirs = [c for _, c in left], [c for _, c in right]
    methods = _same([c.get("method", "ours") for c in ours], [c.get("method", "theirs") for c in theirs])
    rates = [np.log([c.get("learning_rate", 1.0) for c in side]) for side in (ours, theirs)]
    alike = methods * np.exp(-0.5 * (np.subtract.outer(*rates) / RATE_STEP) ** 2)
    for name in sorted({name for c in (*ours, *theirs) for name in c} - UNIMPORTANT):
        values = [[repr(c.get(name)) for c in side] for side in (ours, theirs)]
        if len(set(values[0] + values[1])) > 1:
            alike *= np.where(_same(*values), 1.0, DIFFERENT)
    return (
        OVERALL**2
        + tasks * TASK**2
        + methods * METHOD**2
        + alike * CONFIGURATION**2
        + tasks * (methods * TASK_METHOD**2 + alike * TASK_CONFIGURATION**2)
    )


def _same(left: list[str], right: list[str]) -> np.ndarray:
    codes = {value: i for i, value in enumerate(dict.fromkeys([*left, *right]))}
    return np.equal.outer([codes[v] for v in left], [codes[v] for v in right]).astype(float)
