"""Which selection strategy is better, on which domains, and how sure that is: from the recorded pipelines.

A pipeline's run carries the tag `selection`: how its configuration was chosen ("portfolio", "experience", each also
with "+ sweep", or "asked for"). Strategies are compared on tasks that both have seen, because tasks differ by far more
than strategies do. Confidence comes from Student's t over tasks, whose differences spread by their scores' standard
errors at least; a verdict is corrected for how many pairs and domains are looked at (Holm 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from metapeft.settings import Settings
from metapeft.tracking.client import connect
from metapeft.tracking.compare import chosen

TAG = "selection"
LEVEL = 0.9  # of intervals; that none of the verdicts is an accident is at least as likely
LEAST = 3  # tasks that a verdict needs


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
        score = run.data.metrics.get("score", math.nan)
        if math.isfinite(score):
            best[_place(run)] = max(best.get(_place(run), score), score)
    outcomes = [
        Outcome(
            run.info.run_id,
            run.data.tags[TAG],
            "/".join(_place(run)),
            run.data.tags.get("family") or run.data.tags.get("task_kind", ""),
            run.data.metrics["score"],
            run.data.metrics.get("score_standard_error", 0.0),
            best[_place(run)],
        )
        for run in found
        if TAG in run.data.tags and math.isfinite(run.data.metrics.get("score", math.nan))
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
    return Comparison(list(outcomes), strategies, _judged(pairs))


def _judged(pairs: Sequence[Pair]) -> list[Pair]:
    """With verdicts: the surest pair is asked for the most, as many accidents were possible."""
    enough = sorted((pair for pair in pairs if pair.tasks >= LEAST), key=lambda pair: -abs(pair.p_first_better - 0.5))
    verdicts = {}
    for rank, pair in enumerate(enough):
        chance = 2 * min(pair.p_first_better, 1 - pair.p_first_better)  # of so large a difference, either way
        if chance * (len(enough) - rank) > 1 - LEVEL:
            break
        verdicts[id(pair)] = f"{pair.first if pair.difference > 0 else pair.second} is better"
    return [replace(pair, verdict=verdicts.get(id(pair), pair.verdict)) for pair in pairs]


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
    from scipy.stats import t as student

    shared = sorted(set(left) & set(right))
    if not shared:
        return None
    means = np.array([_mean(left[task]) - _mean(right[task]) for task in shared])
    errors = np.array([np.hypot(_error(left[task]), _error(right[task])) for task in shared])
    count, difference = len(shared), float(means.mean())
    noise = float((errors**2).mean())
    error = math.sqrt(max(float(means.var(ddof=1)) if count > 1 else 0.0, noise) / count)
    spread = student(max(1, count - 1))
    away = float(spread.ppf((1 + LEVEL) / 2)) * error
    better = float(spread.cdf(difference / error)) if error else 0.5 + 0.5 * float(np.sign(difference))
    few = f" from {count} task{'s' if count > 1 else ''}" if count < LEAST else ""
    interval = difference - away, difference + away
    return Pair(first, second, domain, count, difference, *interval, better, f"cannot tell{few}")


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
