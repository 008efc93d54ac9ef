"""Which selection strategy is better, on which domains, and how sure that is: from the recorded pipelines.

A pipeline's run carries the tag `selection`: how its configuration was chosen ("portfolio", "experience", each also
with "+ sweep", or "asked for"). Strategies are compared on tasks that both have seen, because tasks differ by far more
than strategies do. Confidence comes from a bootstrap over tasks in which each score also varies by its standard error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from metapeft.settings import Settings
from metapeft.tracking.client import connect
from metapeft.tracking.compare import chosen

TAG = "selection"
LEVEL = 0.9  # of intervals, and what P(better) must exceed for a verdict
DRAWS = 4000


@dataclass(frozen=True)
class Outcome:
    """One pipeline: what it chose came to `score`; `best` is the best test score known for its task."""

    run: str
    strategy: str
    task: str
    domain: str
    score: float
    error: float
    best: float


@dataclass(frozen=True)
class Strategy:
    """One strategy on one domain ("all": on all of them)."""

    strategy: str
    domain: str
    tasks: int
    runs: int
    score: float
    regret: float  # mean of best known minus chosen; 0 is the oracle


@dataclass(frozen=True)
class Pair:
    """`difference`: mean score of `first` minus that of `second` over the `tasks` that both have seen."""

    first: str
    second: str
    domain: str
    tasks: int
    difference: float
    low: float
    high: float
    p_first_better: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    outcomes: list[Outcome]
    strategies: list[Strategy]
    pairs: list[Pair]

    def to_json(self) -> dict[str, Any]:
        return {"level": LEVEL, **asdict(self)}


def selections(settings: Settings, runs: Sequence[str] = ()) -> Comparison:
    """From recorded runs (named as for `metapeft.tracking.compare.compare`). Raises UserError for an unknown name."""
    found = chosen(settings, connect(settings.tracking), runs)
    best: dict[tuple[str, ...], float] = {}
    for run in found:
        score = run.data.metrics.get("score")
        if score is not None and score == score:
            best[_place(run)] = max(best.get(_place(run), score), score)
    outcomes = [
        Outcome(
            run.info.run_id,
            run.data.tags[TAG],
            "/".join(_place(run)[:3]),
            run.data.tags.get("family") or run.data.tags.get("task_kind", ""),
            run.data.metrics["score"],
            run.data.metrics.get("score_standard_error", 0.0),
            best[_place(run)],
        )
        for run in found
        if TAG in run.data.tags and _place(run) in best and "score" in run.data.metrics
    ]
    return compared(outcomes)


def compared(outcomes: Sequence[Outcome]) -> Comparison:
    """Strategies by regret within each domain, and every pair of them that shares a task."""
    domains = ["all", *sorted({o.domain for o in outcomes})]
    strategies, pairs = [], []
    for domain in domains if len(domains) > 2 else domains[:1]:
        here = [o for o in outcomes if domain in ("all", o.domain)]
        names = sorted({o.strategy for o in here})
        strategies += sorted((_strategy(name, domain, here) for name in names), key=lambda s: s.regret)
        pairs += [pair for a, b in combinations(names, 2) if (pair := _pair(a, b, domain, here)) is not None]
    return Comparison(list(outcomes), strategies, pairs)


def _strategy(name: str, domain: str, outcomes: Sequence[Outcome]) -> Strategy:
    """Every task weighs the same, however often it was run."""
    own = [o for o in outcomes if o.strategy == name]
    tasks = _by_task(own)
    scores = [np.mean([o.score for o in group]) for group in tasks.values()]
    regrets = [np.mean([o.best - o.score for o in group]) for group in tasks.values()]
    return Strategy(name, domain, len(tasks), len(own), float(np.mean(scores)), float(np.mean(regrets)))


def _pair(first: str, second: str, domain: str, outcomes: Sequence[Outcome]) -> Pair | None:
    left = _by_task([o for o in outcomes if o.strategy == first])
    right = _by_task([o for o in outcomes if o.strategy == second])
    shared = sorted(set(left) & set(right))
    if not shared:
        return None
    means = np.array([_mean(left[task]) - _mean(right[task]) for task in shared])
    errors = np.array([np.hypot(_error(left[task]), _error(right[task])) for task in shared])
    random = np.random.default_rng(0)
    draws = random.integers(len(shared), size=(DRAWS, len(shared)))
    values = (means[draws] + errors[draws] * random.standard_normal(draws.shape)).mean(axis=1)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    better = float(np.mean(values > 0) + np.mean(values == 0) / 2)
    if better > LEVEL:
        verdict = f"{first} is better"
    elif better < 1 - LEVEL:
        verdict = f"{second} is better"
    else:
        verdict = "cannot tell"
    if len(shared) < 3:
        verdict = f"cannot tell from {len(shared)} task{'s' if len(shared) > 1 else ''}"
    return Pair(first, second, domain, len(shared), float(means.mean()), float(low), float(high), better, verdict)


def _by_task(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.task, []).append(outcome)
    return groups


def _mean(group: Sequence[Outcome]) -> float:
    return float(np.mean([o.score for o in group]))


def _error(group: Sequence[Outcome]) -> float:
    """Of the mean. Runs of one task share its test split, so more of them do not make it smaller."""
    return float(np.mean([o.error for o in group]))


def _place(run: Any) -> tuple[str, ...]:
    """What scores can be compared within."""
    return tuple(run.data.tags.get(name, "") for name in ("task", "task_version", "backbone", "metric"))
