"""What the meta-model must beat: ways to rank configurations on a new task, all learned from the same other tasks.

A rival is `learn(observations) -> rank`, and `rank(task, configurations, steps)` gives one value per configuration,
higher is better. None of them ever sees the task it ranks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from metapeft.meta import prior
from metapeft.meta.embedding import plain
from metapeft.meta.evidence import Configuration, Known, Observation, complete, key
from metapeft.peft import METHODS
from metapeft.training.configuration import LEARNING_RATES

Rank = Callable[[Known, Sequence[Configuration], int], np.ndarray]
NEAREST = 5
TREES = 300


def portfolio(_: Sequence[Observation]) -> Rank:
    """The belief before any evidence."""
    return lambda task, candidates, steps: np.array([prior.expected(c) for c in candidates])


def single_best(observations: Sequence[Observation]) -> Rank:
    """The same order everywhere: by score above the task's mean, averaged over tasks."""
    effects = centred_effects(observations)
    return lambda task, candidates, steps: np.array([_near(effects, c) for c in candidates])


def nearest_tasks(observations: Sequence[Observation]) -> Rank:
    """What did best on the NEAREST tasks by plain profile, beyond what does best everywhere."""
    effects, metric = centred_effects(observations), plain()
    tables = _by_task(observations)
    known = [t for t in tables if t.features is not None]

    def rank(task: Known, candidates: Sequence[Configuration], steps: int) -> np.ndarray:
        base = np.array([_near(effects, c) for c in candidates])
        if not known:
            return base
        near = metric.similarity([task], known)[0]
        chosen = [known[i] for i in np.argsort(-near, kind="stable")[:NEAREST]]
        values = base.copy()
        for i, c in enumerate(candidates):
            beyond = [tables[t][key(c)] - _level(tables[t], effects) for t in chosen if key(c) in tables[t]]
            values[i] = (sum(beyond) + base[i]) / (len(beyond) + 1)  # the average itself counts as one more task
        return values

    return rank


def forest(observations: Sequence[Observation]) -> Rank:
    """A random forest from profile and configuration to gain, as it comes."""
    return _trees(observations, residual=False)


def residual_forest(observations: Sequence[Observation]) -> Rank:
    """A random forest for what a task's profile changes in the averages."""
    return _trees(observations, residual=True)


def _trees(observations: Sequence[Observation], residual: bool) -> Rank:
    from sklearn.ensemble import RandomForestRegressor

    effects = centred_effects(observations)
    levels = {task: _level(table, effects) for task, table in _by_task(observations).items()}
    rows = np.array([_row(o.task, o.configuration, o.steps) for o in observations])
    target = np.array([o.gain for o in observations])
    if residual:
        target = np.array([o.score - levels[o.task] - _near(effects, o.configuration) for o in observations])
    usable = np.isfinite(target)
    model = RandomForestRegressor(TREES, min_samples_leaf=3, max_features=0.5, random_state=0)
    model.fit(rows[usable], target[usable])

    def rank(task: Known, candidates: Sequence[Configuration], steps: int) -> np.ndarray:
        found: np.ndarray = model.predict(np.array([_row(task, c, steps) for c in candidates]))
        return found + np.array([_near(effects, c) for c in candidates]) if residual else found

    return rank


def _row(task: Known, configuration: Configuration, steps: int) -> np.ndarray:
    rate = math.log(configuration["learning_rate"])
    relative = rate - math.log(LEARNING_RATES[configuration["method"]])
    sizes = [float(configuration.get(n) or 0) for n in ("rank", "target_rank", "tokens", "layers", "batch_size")]
    methods = [float(configuration["method"] == m) for m in METHODS]
    return np.array([*task.vector, rate, relative, *sizes, *methods, math.log2(max(1, steps))])


def defaults(method: str) -> Callable[[Sequence[Observation]], Rank]:
    """A method at its usual learning rate."""

    def learn(_: Sequence[Observation]) -> Rank:
        usual = math.log(LEARNING_RATES[method])

        def value(c: Configuration) -> float:
            plainness = -sum(c.get(n) != v for n, v in complete({"method": method}).items())
            return -abs(math.log(c["learning_rate"]) - usual) + 1e-3 * plainness if c["method"] == method else -math.inf

        return lambda task, candidates, steps: np.array([value(c) for c in candidates])

    return learn


def centred_effects(observations: Sequence[Observation]) -> dict[str, tuple[Configuration, float]]:
    """Configuration key -> (configuration, its mean score above the mean of the task), by additive least squares with a
    ridge of one task, so that one lucky try is no champion and tasks need not have tried the same."""
    tables = _by_task(observations)
    keys = {o.key: o.configuration for o in observations}
    effects = dict.fromkeys(keys, 0.0)
    for _ in range(50):
        levels = {task: float(np.mean([v - effects[k] for k, v in table.items()])) for task, table in tables.items()}
        sums = dict.fromkeys(keys, 0.0)
        counts = dict.fromkeys(keys, 1.0)
        for task, table in tables.items():
            for k, v in table.items():
                sums[k] += v - levels[task]
                counts[k] += 1
        effects = {k: sums[k] / counts[k] for k in keys}
    return {k: (c, effects[k]) for k, c in keys.items()}


def _near(effects: dict[str, tuple[Configuration, float]], configuration: Configuration) -> float:
    """The effect of a configuration, or of the one of its method with the nearest learning rate."""
    exact = effects.get(key(configuration))
    if exact is not None:
        return exact[1]
    rate = math.log(configuration["learning_rate"])
    same = [
        (abs(math.log(c["learning_rate"]) - rate), v)
        for c, v in effects.values()
        if c["method"] == configuration["method"]
    ]
    return min(same)[1] if same else -1.0


def _by_task(observations: Sequence[Observation]) -> dict[Known, dict[str, float]]:
    tables: dict[Known, dict[str, float]] = {}
    for o in observations:
        if math.isfinite(o.score):
            tables.setdefault(o.task, {})[o.key] = o.score
    return tables


def _level(table: dict[str, float], effects: dict[str, tuple[Configuration, float]]) -> float:
    return float(np.mean([v - effects[k][1] for k, v in table.items()]))
