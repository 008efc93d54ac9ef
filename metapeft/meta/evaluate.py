"""Is the advice any good, on tasks of a kind never seen? `evaluate(observations) -> Evaluation`, deterministic.

Protocol. Every family of tasks is left out in turn, with everything that is fitted (metric, variances, reach,
calibration, rivals) fitted without it. For each of its tasks the configurations that were tried there are ranked;
what was measured there is only looked at afterwards.

Regret. `regret` is the best test score measured on the task minus the measured test score of the first choice. The best
of twenty noisy scores is partly luck, so even a perfect selector has regret. `regret_corrected` compares with the
configuration that is best on the validation split instead, also by test score: an opponent chosen by other examples has
no luck on these (it may be negative). `floor` is the regret that a perfect selector would have for that luck alone.
The remaining gap is the mean regret divided by that of the single best configuration of the other families.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from metapeft.meta import gains, rivals, scores
from metapeft.meta.evidence import Observation, without
from metapeft.meta.fitting import Group, fit, groups
from metapeft.meta.forecast import CLOSE, Forecast, forecast, tests_of, untuned_of
from metapeft.meta.model import Conditioned, Model
from metapeft.meta.threads import one_thread
from metapeft.peft import METHODS

Fit = Callable[[Sequence[Observation]], Model]
LEAST = 4  # configurations tried on a task that is judged
LEAST_JUDGED = 8  # tasks that targets are judged by
SIZES = (8, 12, 16, 24, 32)  # known tasks on the learning curve
DRAWS = 6  # of known tasks, per size
RESAMPLES = 2000
OURS = "metapeft"
RIVALS: dict[str, Callable[[Sequence[Observation]], rivals.Rank]] = {
    "single best configuration": rivals.single_best,
    "portfolio": rivals.portfolio,
    "nearest tasks": rivals.nearest_tasks,
    "random forest": rivals.forest,
    "random forest on residuals": rivals.residual_forest,
    **{f"default {method}": rivals.defaults(method) for method in METHODS},
}
SBS = "single best configuration"


@dataclass
class Judged:
    """One task that was left out: what was measured there, and what was said of it before."""

    task: str
    version: str
    family: str
    steps: int
    train_examples: int
    configurations: int
    best: float
    spread: float  # standard deviation of the scores measured there
    regret: dict[str, float] = field(default_factory=dict)  # by selector
    regret_corrected: dict[str, float] = field(default_factory=dict)
    top1: dict[str, float] = field(default_factory=dict)
    top3: dict[str, float] = field(default_factory=dict)
    spearman: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    three: dict[str, bool] = field(default_factory=dict)  # whether the best of three is within 5 % of the best
    floor: float = 0.0
    sure: float = 0.0  # P(within 1 %) of our first choice
    reach: float = 0.0
    seen: list[float] = field(default_factory=list)  # one entry per configuration from here on
    mean: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    crps: list[float] = field(default_factory=list)
    inside: dict[str, list[bool]] = field(default_factory=dict)  # by level
    width: dict[str, list[float]] = field(default_factory=dict)
    p_best: list[float] = field(default_factory=list)
    is_best: list[float] = field(default_factory=list)
    p_within: list[float] = field(default_factory=list)
    is_within: list[float] = field(default_factory=list)


def judge(observations: Sequence[Observation], fitted: Fit = fit, rival: Sequence[str] = tuple(RIVALS)) -> list[Judged]:
    """Every family left out in turn."""
    found: list[Judged] = []
    with one_thread():
        for family in sorted({o.task.family for o in observations}):
            asked = groups([o for o in observations if o.task.family == family], LEAST)
            known = without(observations, {family})
            if asked and known:
                found += judge_on(known, asked, fitted, rival)
    return found


def judge_on(
    known: Sequence[Observation], asked: Sequence[Group], fitted: Fit = fit, rival: Sequence[str] = (SBS,)
) -> list[Judged]:
    """Groups of observations, each of one task, by what is learned from `known`."""
    model = fitted(known)
    conditioned = Conditioned(model, known)
    ranks = {name: RIVALS[name](known) for name in rival}
    return [_judged(group, conditioned, ranks) for group in asked]


def _judged(group: Group, known: Conditioned, ranks: dict[str, rivals.Rank]) -> Judged:
    first = group[0]
    candidates = [o.configuration for o in group]
    seen, held = (np.array([getattr(o, name) for o in group]) for name in ("score", "validation"))
    untuned = untuned_of(group)
    tests = tests_of(group)
    told = forecast(known, first.task, candidates, first.steps, untuned, tests, device=first.device)
    result = Judged(
        first.task.name, first.task.version, first.task.family, first.steps, first.task.train_examples,
        len(group), float(seen.max()), float(seen.std()),
    )  # fmt: skip
    values = {name: rank(first.task, candidates, first.steps) for name, rank in ranks.items()}
    values[OURS] = told.mean
    reference = _opponent(seen, held)
    for name, value in values.items():
        if np.isneginf(value).all():  # a method that was never tried here
            continue
        order = np.argsort(-value, kind="stable")
        result.regret[name] = float(seen.max() - seen[order[0]])
        result.regret_corrected[name] = float(reference - seen[order[0]])
        result.top1[name] = float(seen[order[0]] == seen.max())
        result.top3[name] = float(seen[order[:3]].max() == seen.max())
        if np.isfinite(value).all():
            result.spearman[name] = scores.spearman(value, seen)
        result.chosen[name] = candidates[order[0]]["method"]
    chosen = {
        "first": np.argsort(-told.mean, kind="stable")[:3].tolist(),
        "together": told.together(3, np.zeros(len(group))),
    }
    result.three = {which: bool(seen[places].max() >= 0.95 * seen.max()) for which, places in chosen.items()}
    result.regret["random"] = float(seen.max() - seen.mean())
    result.regret_corrected["random"] = float(reference - seen.mean())
    result.top1["random"] = float((seen == seen.max()).mean())
    result.regret["oracle"] = 0.0
    result.regret_corrected["oracle"] = float(reference - seen.max())
    result.floor = _floor(seen, known.model, tests, untuned[0], first.repeats)
    result.reach = known.model.reach
    _uncertainty(result, told, seen, tests)
    return result


def _opponent(seen: np.ndarray, held: np.ndarray) -> float:
    """The test score of what is best on the validation split; the mean over ties."""
    if not np.isfinite(held).any():
        return float(seen.max())
    return float(seen[held == np.nanmax(held)].mean())


def _floor(seen: np.ndarray, model: Model, tests: int, untuned: float, repeats: int) -> float:
    """Expected regret of choosing what was best in one run of all, measured in another run with other seeds: the
    noise of both is drawn from what the model holds a repetition to vary, around scores that are shrunk by it."""
    random = np.random.default_rng(0)
    seed = model.deviations["seed"] * gains.room(untuned)
    examples = model.deviations["sampling"] * np.sqrt(seen * (1 - seen) / tests)
    noise = np.sqrt(seed**2 / repeats + examples**2)
    keep = max(0.0, 1 - float(np.mean(noise**2)) / max(1e-9, float(seen.var())))
    true = seen.mean() + math.sqrt(keep) * (seen - seen.mean())
    once, again = (true + noise * random.standard_normal((1000, len(seen))) for _ in range(2))
    return float((again.max(axis=1) - again[np.arange(1000), once.argmax(axis=1)]).mean())


def _uncertainty(result: Judged, told: Forecast, seen: np.ndarray, tests: int) -> None:
    result.seen, result.mean = seen.tolist(), told.mean.tolist()
    result.nll = scores.nll(told.draws, seen, np.full(len(seen), 1 / tests)).tolist()
    result.crps = scores.crps(told.draws, seen).tolist()
    for level in (0.8, 0.9):
        low, high = told.interval(level)
        result.inside[f"{level}"] = ((seen >= low - 1e-9) & (seen <= high + 1e-9)).tolist()
        result.width[f"{level}"] = (high - low).tolist()
    ties = seen == seen.max()
    result.p_best, result.is_best = told.p_best.tolist(), (ties / ties.sum()).tolist()
    result.p_within, result.is_within = told.p_within.tolist(), (seen >= seen.max() - CLOSE).astype(float).tolist()
    result.sure = float(told.p_within[told.mean.argmax()])


@dataclass
class Evaluation:
    """`summary` and `selectors` are means over tasks with 90 % bootstrap intervals; `tasks` are the details."""

    trials: int
    observations: int
    tasks: list[Judged]
    summary: dict[str, Any]
    selectors: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    targets: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(observations: Sequence[Observation], trials: int = 0, curve: bool = True) -> Evaluation:
    """Minutes, with a thousand observations."""
    judged = judge(observations)
    found = Evaluation(trials, len(observations), judged, {}, [], [], [])
    if judged:
        found.summary, found.selectors = summary(judged) | repetition(observations), selectors(judged)
        found.curve = [*(learning_curve(observations) if curve else []), _point(judged, _known(observations))]
    found.targets = targets(found)
    return found


def learning_curve(observations: Sequence[Observation]) -> list[dict[str, Any]]:
    """The remaining gap with few known tasks: DRAWS times, whole families are known until there are so many tasks, and
    tasks of the other families are asked."""
    families = sorted({o.task.family for o in observations})
    rows = []
    for size in SIZES:
        if size > 0.8 * _known(observations):
            break
        judged: list[Judged] = []
        with one_thread():
            for draw in range(DRAWS):
                random = np.random.default_rng([size, draw])
                order = [families[i] for i in random.permutation(len(families))]
                known, used = _first_tasks(observations, order, size, random)
                asked = groups(without(observations, used), LEAST)
                if asked:
                    judged += judge_on(known, asked)
        if judged:
            rows.append(_point(judged, size))
    return rows


def _first_tasks(
    observations: Sequence[Observation], order: list[str], size: int, random: np.random.Generator
) -> tuple[list[Observation], set[str]]:
    names: list[str] = []
    used: set[str] = set()
    for family in order:
        if len(names) >= size:
            break
        own = sorted({o.task.name for o in observations if o.task.family == family})
        names += [own[i] for i in random.permutation(len(own))][: size - len(names)]
        used.add(family)
    return [o for o in observations if o.task.name in names], used


def _known(observations: Sequence[Observation]) -> int:
    return len({o.task.name for o in observations})


def _point(judged: Sequence[Judged], tasks: int) -> dict[str, Any]:
    low, high = bootstrap(judged, gap)
    return {
        "tasks": tasks,
        "judged": len(judged),
        "gap": gap(judged),
        "low": low,
        "high": high,
        "regret": mean_of(judged, "regret", OURS),
        "regret_sbs": mean_of(judged, "regret", SBS),
    }


def gap(judged: Sequence[Judged]) -> float:
    """regret / regret of the single best configuration; 0 is the oracle."""
    return mean_of(judged, "regret", OURS) / max(1e-9, mean_of(judged, "regret", SBS))


def gap_corrected(judged: Sequence[Judged]) -> float:
    """The same with regret that luck does not explain: over the floor."""
    floor = float(np.mean([j.floor for j in judged]))
    ours, sbs = (mean_of(judged, "regret", name) - floor for name in (OURS, SBS))
    return ours / sbs if sbs > 1e-9 else math.nan


def mean_of(judged: Sequence[Judged], measure: str, selector: str) -> float:
    values = [getattr(j, measure)[selector] for j in judged if selector in getattr(j, measure)]
    return float(np.mean(values)) if values else math.nan


def bootstrap(judged: Sequence[Judged], statistic: Callable[[Sequence[Judged]], float]) -> tuple[float, float]:
    """90 % percentile interval over families: what is predicted for the tasks of one stands on the same other ones."""
    names = sorted({j.family for j in judged})
    by_name = {name: [j for j in judged if j.family == name] for name in names}
    random = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        picked = random.integers(len(names), size=len(names))
        values.append(statistic([j for i in picked for j in by_name[names[i]]]))
    low, high = np.nanquantile(values, [0.05, 0.95])
    return float(low), float(high)


def pooled(judged: Sequence[Judged], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(j, name), dtype=float) for j in judged])


def summary(judged: Sequence[Judged]) -> dict[str, Any]:
    """One value per measure."""
    low, high = bootstrap(judged, gap)
    covered = {level: [float(np.mean(j.inside[level])) for j in judged] for level in ("0.8", "0.9")}
    within, was = pooled(judged, "p_within"), pooled(judged, "is_within")
    best, is_best = pooled(judged, "p_best"), pooled(judged, "is_best")
    return {
        "tasks": len({j.task for j in judged}),
        "groups": len(judged),
        "families": len({j.family for j in judged}),
        "configurations": int(sum(j.configurations for j in judged)),
        "gap": gap(judged),
        "gap_low": low,
        "gap_high": high,
        "gap_over_floor": gap_corrected(judged),
        "floor": float(np.mean([j.floor for j in judged])),
        "spearman": mean_of(judged, "spearman", OURS),
        "spearman_of_differing": _weighted_spearman(judged),
        "coverage_80": float(np.mean(covered["0.8"])),
        "coverage_90": float(np.mean(covered["0.9"])),
        "width_80": float(np.mean(np.concatenate([j.width["0.8"] for j in judged]))),
        "width_90": float(np.mean(np.concatenate([j.width["0.9"] for j in judged]))),
        "nll": float(pooled(judged, "nll").mean()),
        "crps": float(pooled(judged, "crps").mean()),
        "brier_best": scores.brier(best, is_best),
        "ece_best": scores.ece(best, is_best),
        "brier_within": scores.brier(within, was),
        "ece_within": scores.ece(within, was),
        "reliability_within": scores.reliability(within, was),
        "reliability_best": scores.reliability(best, is_best),
        "risk_coverage": risk_coverage(judged),
        "three_first_within_5_percent": float(np.mean([j.three["first"] for j in judged])),
        "three_together_within_5_percent": float(np.mean([j.three["together"] for j in judged])),
    }


def repetition(observations: Sequence[Observation]) -> dict[str, Any]:
    """What another seed alone changes: the standard deviation of the test score over `repeated` configurations, and the
    regret of running one of them again, E max(0, first - again) = deviation / sqrt(pi)."""
    pairs = [(o.between, o.repeats - 1) for o in observations if math.isfinite(o.between)]
    if not pairs:
        return {"repeated": 0, "repeat_deviation": None, "repeat_regret": None}
    deviation = math.sqrt(sum(v * n for v, n in pairs) / sum(n for _, n in pairs))
    return {
        "repeated": len(pairs),
        "repeat_deviation": deviation,
        "repeat_regret": deviation / math.sqrt(math.pi),
    }


def _weighted_spearman(judged: Sequence[Judged]) -> float:
    """Weighted by how much of a task's spread is more than noise: where all are equal there is no order to find."""
    weights = np.array([max(0.0, j.spread**2 - (1.5 * j.floor) ** 2) ** 0.5 for j in judged])
    values = np.array([j.spearman.get(OURS, 0.0) for j in judged])
    return float(weights @ values / weights.sum()) if weights.sum() > 0 else math.nan


def risk_coverage(judged: Sequence[Judged]) -> list[dict[str, float]]:
    """Mean regret when only the tasks are answered on which the first choice is surest."""
    ordered = sorted(judged, key=lambda j: -j.sure)
    regrets = np.cumsum([j.regret[OURS] for j in ordered]) / np.arange(1, len(ordered) + 1)
    return [{"answered": (i + 1) / len(ordered), "regret": float(r)} for i, r in enumerate(regrets)]


def selectors(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """One row per selector, by mean regret. A method's default counts only where the method was tried."""
    names = dict.fromkeys(name for j in judged for name in j.regret)
    rows = []
    for name in names:
        some = [j for j in judged if name in j.regret]
        low, high = bootstrap(some, lambda js, name=name: mean_of(js, "regret", name))  # type: ignore[misc]
        rows.append(
            {
                "selector": name,
                "regret": mean_of(some, "regret", name),
                "low": low,
                "high": high,
                "regret_corrected": mean_of(some, "regret_corrected", name),
                "gap": mean_of(some, "regret", name) / max(1e-9, mean_of(some, "regret", SBS)),
                "top1": mean_of(some, "top1", name),
                "top3": mean_of(some, "top3", name),
                "spearman": mean_of(some, "spearman", name),
                "tasks": len(some),
            }
        )
    return sorted(rows, key=lambda row: row["regret"])


def targets(found: Evaluation) -> list[dict[str, Any]]:
    """What is promised, and whether it is kept. No value with fewer than LEAST_JUDGED tasks: it would be luck."""
    s, curve = found.summary, found.curve

    def target(name: str, value: float | None, wanted: str, met: bool) -> dict[str, Any]:
        known = value is not None and math.isfinite(value) and s.get("tasks", 0) >= LEAST_JUDGED
        return {
            "name": name,
            "value": round(value, 4) if known and value is not None else None,
            "target": wanted,
            "met": known and met,
        }

    gaps = [row["gap"] for row in curve if row["tasks"] >= 8]
    worst = max(gaps, default=math.nan)
    falls = gaps[-1] - gaps[0] if len(gaps) > 1 else math.nan
    get = s.get
    return [
        target("remaining gap", get("gap"), "<= 0.60", get("gap", 9) <= 0.60),
        target("remaining gap, upper end of its 90 % interval", get("gap_high"), "< 1", get("gap_high", 9) < 1),
        target("highest remaining gap with 8 known tasks or more", worst, "<= 1", worst <= 1),
        target("change of the gap from few known tasks to all", falls, "< 0", falls < 0),
        target("coverage of 90 % intervals", get("coverage_90"), "0.86 to 0.94", 0.86 <= get("coverage_90", 0) <= 0.94),
        target("ECE of P(within 1 %)", get("ece_within"), "<= 0.07", get("ece_within", 9) <= 0.07),
        target("Spearman", get("spearman"), ">= 0.6", get("spearman", 0) >= 0.6),
    ]
