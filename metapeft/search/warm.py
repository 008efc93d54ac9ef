"""What a warm sweep tries first: what the meta-model recommends, and what was best on the most similar tasks.

Only configurations travel from other tasks, never their scores: scores of different tasks are not on one scale, and
would mislead the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any

from metapeft.search import pareto
from metapeft.training.configuration import full
from metapeft.training.trial import Trial

MOST_TASKS = 3
MOST_EACH = 4  # points of one task's front
WORTH = 0.005  # share of the expected hypervolume that one more configuration must add
CHEAPER = 0.95  # share of its score that a cheaper variant is expected to keep

Predict = Callable[[dict[str, Any]], tuple[float, float, float] | None]  # -> score, seconds, MiB


def nearest_fronts(trials: Sequence[Trial], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The fronts of these tasks (most similar first), the best named point of each before the second of any.

    Of a task that was tried at several sizes the largest counts.
    """
    fronts = []
    for task in tasks[:MOST_TASKS]:
        known = [t for t in trials if t.task == task]
        if known:
            version = max(known, key=lambda t: (t.train_examples, t.task_version)).task_version
            same = [t for t in known if t.task_version == version]
            points = pareto.named(same)
            named = [points[name] for name in ("most accurate", "balanced", "fastest", "smallest") if name in points]
            unique = {trial.id: trial for trial in named + pareto.front(same)}
            fronts.append([t.configuration for t in unique.values()][:MOST_EACH])
    return [c for c in chain.from_iterable(zip_longest(*fronts)) if c is not None]


def warm_start(
    first: Sequence[dict[str, Any]],
    recommended: Sequence[dict[str, Any]],
    nearest: Sequence[dict[str, Any]],
    trials: int,
    predict: Predict | None = None,
) -> list[dict[str, Any]]:
    """At most half of the trials (or one per method): the rest is for what nobody expected.

    A sweep of one trial per method sees the first recommended configuration of each. A longer one begins with `first`,
    the ones to try together. What follows adds most to the hypervolume that `predict` expects, of the recommended ones,
    the similar tasks' fronts, and cheaper variants of both: a front has a cheap end too. Without `predict` (or where it
    knows nothing) the similar tasks' fronts and the other recommended ones take turns.
    """
    best = list({c["method"]: c for c in reversed(recommended)}.values())
    ordered = [c for c in recommended if c in best]
    others = [c for c in recommended if c not in best]
    most = max(len(best), trials // 2)
    turns = _unique([*ordered, *(c for c in chain(*zip_longest(nearest, others)) if c is not None)])
    if predict is None or trials <= len(best):
        return turns[:most]
    chosen = _unique(first)
    pool = [(c, predict(c), 1.0) for c in turns] + [(v, predict(v), CHEAPER) for c in turns for v in _cheaper(c)]
    points = [(c, (share * p[0], p[1], p[2])) for c, p, share in pool if p is not None]
    if not points:
        return turns[:most]
    return _unique([*chosen, *_spread(points, chosen, most)])


def _spread(
    pool: Sequence[tuple[dict[str, Any], tuple[float, float, float]]], chosen: Sequence[dict[str, Any]], most: int
) -> list[dict[str, Any]]:
    """Greedily what adds most hypervolume to what is chosen already, as long as it is worth a trial."""
    slowest, largest = (1.1 * max(p[i] for _, p in pool) for i in (1, 2))
    scaled = [(c, (1 - p[0], p[1] / slowest, p[2] / largest)) for c, p in pool]
    kept = [p for c, p in scaled if c in chosen]
    found: list[dict[str, Any]] = []
    while len(found) + len(chosen) < most:
        before = pareto.hypervolume(kept, (1.0, 1.0, 1.0))
        gains = [pareto.hypervolume([*kept, p], (1.0, 1.0, 1.0)) - before for _, p in scaled]
        top = max(range(len(scaled)), key=gains.__getitem__)
        if gains[top] <= WORTH * before:
            break
        found.append(scaled[top][0])
        kept.append(scaled[top][1])
    return found


def _cheaper(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    """Half the batch; and for matrices also the top sixth of a usual backbone's layers (moved into the space later)."""
    values = full(configuration)
    half = configuration | {"batch_size": max(1, values["batch_size"] // 2)}
    return [half, half | {"layers": 5}] if "layers" in values else [half]


def _unique(configurations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    known: list[dict[str, Any]] = []
    found = []
    for configuration in configurations:
        values = full(configuration)
        if values not in known:
            known.append(values)
            found.append(configuration)
    return found
