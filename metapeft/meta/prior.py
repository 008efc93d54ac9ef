"""What is believed before any evidence: expected gains, how much things vary, and which configurations are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from metapeft.meta.evidence import Configuration, Known
from metapeft.meta.portfolio import PORTFOLIO

# Standard deviations of the model's terms, in gain (see `metapeft.meta.model`): wide, for tasks differ much more than
# methods do. Fitting starts here, and stays near where evidence is thin.
DEVIATIONS = {
    "overall": 0.2,  # everywhere: the portfolio may be too hopeful, or not hopeful enough
    "method": 0.1,
    "configuration": 0.15,
    "device": 0.05,  # what a device has of its own; only where trials of several are known
    "task": 0.3,  # the level of one task
    "task_linear": 0.2,  # of that level, what the profile says
    "task_similar": 0.1,  # and what similar tasks say
    "task_method": 0.1,
    "task_configuration": 0.1,
    "similar_method": 0.1,  # what similar tasks say of a method
    "similar_configuration": 0.1,
    "doubling": 0.05,  # a budget twice as large or small
    "seed": 0.05,  # the same training with another seed
    "sampling": 0.7,  # share (of the standard error) of a test split's error that is not common to all configurations
}
RATE_STEP = math.log(3.0)  # learning rates a factor of 3 apart share 60 % of their variance
DIFFERENT = 0.6  # what configurations that differ in one more hyperparameter still share
OTHER_BACKBONE = 0.5  # what the effects on another backbone share with those on this one
OTHER_SIZE = 0.8  # what the effects on a task share with those on a sample of it half the size
HINTED = 0.6  # how much of what frozen features reach, beyond what is expected anyway, tuning is expected to reach
UNIMPORTANT = frozenset({"method", "learning_rate", "evaluations", "patience", "checkpoint", "accumulate", "clip"})


def expected(configuration: Configuration) -> float:
    """The portfolio's belief for the entry of the same method with the nearest learning rate."""
    rate = math.log(configuration["learning_rate"])
    same = _rates()[configuration["method"]]
    return min(same, key=lambda entry: abs(entry[0] - rate))[1]


def expected_level(task: Known) -> float:
    """What a task's profile adds to every gain on it: the better of a linear probe on frozen features and always naming
    the commonest label. Tuning sees more than they do: less than is expected anyway says nothing."""
    return HINTED * max(0.0, task.hint - _average())


def alike(left: Sequence[Configuration], right: Sequence[Configuration]) -> tuple[np.ndarray, np.ndarray]:
    """(same method, how alike within a method), both (left, right) in [0, 1]. Configurations hold all values.

    A Gaussian kernel on the log learning rate times DIFFERENT for every other hyperparameter that differs.
    """
    methods = _same([c["method"] for c in left], [c["method"] for c in right])
    rates = [np.log([c["learning_rate"] for c in side]) for side in (left, right)]
    close = methods * np.exp(-0.5 * (np.subtract.outer(*rates) / RATE_STEP) ** 2)
    for name in sorted({name for c in (*left, *right) for name in c} - UNIMPORTANT):
        values = [[repr(c.get(name)) for c in side] for side in (left, right)]
        if len(set(values[0] + values[1])) > 1:
            close *= np.where(_same(*values), 1.0, DIFFERENT)
    return methods, close


@lru_cache(maxsize=1)
def _rates() -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in PORTFOLIO:
        rate = math.log(entry.configuration["learning_rate"])
        found.setdefault(entry.configuration["method"], []).append((rate, entry.gain))
    return found


@lru_cache(maxsize=1)
def _average() -> float:
    return float(np.mean([entry.gain for entry in PORTFOLIO]))


def _same(left: list[str], right: list[str]) -> np.ndarray:
    codes = {value: i for i, value in enumerate(dict.fromkeys([*left, *right]))}
    return np.equal.outer([codes[v] for v in left], [codes[v] for v in right]).astype(float)
