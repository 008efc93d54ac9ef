"""What a warm sweep tries first: what the meta-model recommends, and what was best on the most similar tasks.

Only configurations travel from other tasks, never their scores: scores of different tasks are not on one scale, and
would mislead the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from metapeft.search import pareto
from metapeft.training.configuration import full
from metapeft.training.trial import Trial

MOST_TASKS = 3
MOST_EACH = 4  # points of one task's front


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
            fronts.append([t.configuration for t in _unique(named + pareto.front(same))][:MOST_EACH])
    return [c for c in chain.from_iterable(zip_longest(*fronts)) if c is not None]


def warm_start(
    recommended: Sequence[dict[str, Any]], nearest: Sequence[dict[str, Any]], trials: int
) -> list[dict[str, Any]]:
    """The first recommended configuration of every method, so that a short sweep sees all of them; then by turns from
    the similar tasks' fronts and the other recommended ones.

    They take at most half of the trials (or one per method): the rest is for what nobody expected.
    """
    first = list({c["method"]: c for c in reversed(recommended)}.values())
    ordered = [c for c in recommended if c in first]
    others = [c for c in recommended if c not in first]
    chosen: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []
    for configuration in chain(ordered, *zip_longest(nearest, others)):
        if configuration is not None and full(configuration) not in known:
            known.append(full(configuration))
            chosen.append(configuration)
    return chosen[: max(len(first), trials // 2)]


def _unique(trials: Sequence[Trial]) -> list[Trial]:
    return list({trial.id: trial for trial in trials}.values())
