"""Which configurations to use on a task, how good they will be, how sure that is, and what they cost.

Scores. What is measured is the untuned backbone's score, what a linear probe reaches, and, where there are any, trials.
Everything else is the belief of `metapeft.meta.beliefs` about gains, drawn from DRAWS times together for all
configurations: a draw's score lies between 0 and 1, the untuned score being where gain 0 is, so the interval is as wide
as the range that is left and the belief allow. `low` and `high` bound the score to be measured on the task's test split
with probability `level`, its sampling error included; `p_best` and `p_within_1pct` are shares of draws in which the
configuration is the best of those listed, and within 0.01 of the best.

Evidence. Trials of the same task and backbone always count; trials of other tasks once there are LEAST_TASKS of them.
With neither the basis is "portfolio": the intervals then say how little is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.meta import beliefs
from metapeft.meta.costs import Cost, cost
from metapeft.meta.experience import Experience
from metapeft.meta.portfolio import portfolio
from metapeft.peft import METHODS
from metapeft.profiling import Profile, known_profiles
from metapeft.profiling import speed as speeds
from metapeft.profiling.speed import Speed
from metapeft.settings import Prefer, Settings
from metapeft.training.trial import Trial

Basis = Literal["experience", "portfolio"]
LEVEL = 0.9
DRAWS = 4000
LEAST_TASKS = 5  # other tasks with trials before they say anything about this one
LEAST_SEEN = 3  # other tasks on which a configuration was tried before it is recommended
MOST_TRIED = 20  # configurations tried on this task that are listed beside the portfolio
NEIGHBOURS = 5
# What a tenfold saving of (seconds, memory) is worth, in score.
WORTH: dict[Prefer, tuple[float, float]] = {
    "accuracy": (0.0, 0.0),
    "balanced": (0.02, 0.01),
    "speed": (0.2, 0.0),
    "memory": (0.0, 0.2),
}


@dataclass(frozen=True)
class Prediction:
    """The expected score and the interval that holds it with probability `level`."""

    mean: float
    low: float
    high: float
    level: float = LEVEL


@dataclass(frozen=True)
class Recommended:
    """One configuration: predicted score, chances, and cost on this machine for the settings' training budget."""

    rank: int
    method: str
    configuration: dict[str, Any]
    score: Prediction
    p_best: float
    p_within_1pct: float
    seconds: float
    peak_memory_mb: float
    adapter_bytes: int


@dataclass(frozen=True)
class Neighbour:
    """A known task; similarity 1 is the same profile, 0 is nothing in common."""

    task: str
    similarity: float


@dataclass(frozen=True)
class Recommendation:
    task: str
    basis: Basis
    recommendations: tuple[Recommended, ...]
    neighbours: tuple[Neighbour, ...]

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        return {**record, "recommendations": list(record["recommendations"]), "neighbours": list(record["neighbours"])}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Recommendation:
        entries = [Recommended(**{**r, "score": Prediction(**r["score"])}) for r in record["recommendations"]]
        neighbours = [Neighbour(**n) for n in record["neighbours"]]
        return cls(record["task"], record["basis"], tuple(entries), tuple(neighbours))


def recommend(
    task: Task,
    profile: Profile,
    settings: Settings,
    experience: Experience | None = None,
    speed: Speed | None = None,
) -> Recommendation:
    """Ranked configurations, by expected score less what the preference makes of their cost.

    experience: None is the one in METAPEFT_HOME. speed: this machine's; None is the one that was measured together with
    the profile. Raises UserError when the budgets exclude every configuration.
    """
    speed = speed or speeds.read(profile.backbone_content) or nominal_speed(profile)
    trials = [
        t for t in (experience or Experience()).trials() if t.backbone == profile.backbone and t.method in METHODS
    ]
    own = [t for t in trials if t.task_version == task.version]
    others = [t for t in trials if t.task_version != task.version]
    if len({t.task_version for t in others}) < LEAST_TASKS:
        others = []
    steps = settings.train.steps
    untuned = profile.features["zero_shot_score"]
    observations = observe([*own, *others], steps, {task.version: untuned})
    seen = {o.task for o in observations}

    candidates = _candidates(profile.shapes.depth, own, others)
    costs = _corrected([cost(c, profile, speed, steps) for c in candidates], own, profile, speed)
    feasible = _feasible(candidates, costs, settings)
    candidates, costs = [candidates[i] for i in feasible], [costs[i] for i in feasible]

    known = [*observations, *hint(profile, task)]
    mean, covariance = beliefs.posterior(task.version, [beliefs.complete(c) for c in candidates], known)
    predictions, best, within = _predict(mean, covariance, untuned, profile, len(task.test))
    worth = _utility(predictions, costs, settings.recommend.prefer)
    order = sorted(range(len(candidates)), key=lambda i: (-worth[i], costs[i].seconds))
    return Recommendation(
        task=task.name,
        basis="experience" if seen else "portfolio",
        recommendations=tuple(
            Recommended(
                rank=rank,
                method=candidates[i]["method"],
                configuration=candidates[i],
                score=predictions[i],
                p_best=round(float(best[i]), 4),
                p_within_1pct=round(float(within[i]), 4),
                seconds=round(costs[i].seconds, 1),
                peak_memory_mb=round(costs[i].peak_memory_mb, 1),
                adapter_bytes=costs[i].adapter_bytes,
            )
            for rank, i in enumerate(order, 1)
        ),
        neighbours=neighbours(profile, {t.task_version: t.task for t in trials if t.task_version in seen}),
    )


def observe(trials: Sequence[Trial], steps: int, untuned: dict[str, float]) -> list[beliefs.Observation]:
    """What trials say about gains at a budget of `steps`, averaged over trials of one configuration on one task.

    untuned: scores of the untuned backbone by task version, for trials that do not carry their own. A diverged training
    leaves the backbone untuned: gain 0. Trials that failed for other reasons, or were never scored, say nothing.
    """
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], float, float]]] = {}
    for trial in trials:
        base = trial.untuned_score.value if trial.untuned_score else untuned.get(trial.task_version)
        found = trial.score or trial.validation
        if (
            base is None
            or trial.status in ("out_of_memory", "failed")
            or (found is None and trial.status != "diverged")
        ):
            continue
        configuration = beliefs.complete(trial.configuration)
        measured, error = 0.0, 0.0
        if trial.status != "diverged" and found is not None:
            measured = beliefs.gain(found.value, base)
            error = found.standard_error / max(beliefs.FLOOR, 1 - base)
        budget = beliefs.DOUBLING * math.log2(max(1, trial.budget) / steps)
        noise = math.sqrt(error**2 + beliefs.SEED**2 + budget**2)
        groups.setdefault((trial.task_version, beliefs.key(configuration)), []).append((configuration, measured, noise))
    result = []
    for (version, _), measurements in groups.items():
        weights = np.array([1 / noise**2 for _, _, noise in measurements])
        value = float(weights @ [m for _, m, _ in measurements] / weights.sum())
        result.append(beliefs.Observation(version, measurements[0][0], value, float(1 / math.sqrt(weights.sum()))))
    return result


def hint(profile: Profile, task: Task) -> list[beliefs.Observation]:
    """What can be learned without tuning, as a vague observation of the task's level: the better of a linear probe on
    frozen features and always naming the commonest label. Tuning can see more than they do: less than is expected
    anyway says nothing. Only for tasks that are scored as they are, by accuracy."""
    features = profile.features
    reached = max(features["probe_accuracy"], features["majority_share"])
    gain = beliefs.gain(reached, features["zero_shot_score"])
    if task.metric != "accuracy" or gain <= beliefs.expected({}):
        return []
    return [beliefs.Observation(task.version, {}, gain, beliefs.HINT)]


def neighbours(profile: Profile, known: dict[str, str]) -> tuple[Neighbour, ...]:
    """The tasks (version -> name) with the most similar embeddings, of those whose profile is in METAPEFT_HOME."""
    here = np.array(profile.embedding)
    found = []
    for other in known_profiles(profile.backbone_content):
        if other.task_version in known and other.task_version != profile.task_version:
            distance = float(np.mean((here - np.array(other.embedding)) ** 2))
            found.append(Neighbour(known[other.task_version], round(math.exp(-0.5 * distance), 4)))
    return tuple(sorted(found, key=lambda n: (-n.similarity, n.task))[:NEIGHBOURS])


def nominal_speed(profile: Profile) -> Speed:
    """A guess for a machine that was never measured: 50 GFLOP/s of everything."""
    shapes, rate = profile.shapes, 5e10
    forward = 2 * sum(layer.parameters for layer in shapes.each()) / rate
    head = 2 * shapes.vocabulary * shapes.width / rate
    return Speed(forward, 2 * forward, head, 2 * head, 0.0, {})


def _candidates(depth: int, own: list[Trial], others: list[Trial]) -> list[dict[str, Any]]:
    """The portfolio, what was tried on this task, and what was tried on enough others; short forms, each once."""
    tried = [t for t in own if t.score or t.validation]
    tried = sorted(tried, key=lambda t: -(t.score or t.validation).value)[:MOST_TRIED]  # type: ignore[union-attr]
    tasks: dict[str, set[str]] = {}
    for trial in others:
        tasks.setdefault(beliefs.key(trial.configuration), set()).add(trial.task_version)
    often = [t for t in others if len(tasks[beliefs.key(t.configuration)]) >= LEAST_SEEN]
    impossible = {beliefs.key(t.configuration) for t in own if t.status == "out_of_memory"}
    found: dict[str, dict[str, Any]] = {}
    for configuration in (*portfolio(depth), *(t.configuration for t in (*tried, *often))):
        key = beliefs.key(configuration)
        if key not in impossible:
            found.setdefault(key, short(configuration))
    return list(found.values())


def short(configuration: dict[str, Any]) -> dict[str, Any]:
    """Without the values that are defaults anyway, except method, learning rate and batch size."""
    usual = beliefs.complete({"method": configuration["method"]})
    named = ("method", "learning_rate", "batch_size")
    chosen = beliefs.complete(configuration)
    return {key: chosen[key] for key in chosen if key in named or chosen[key] != usual[key]}


def _corrected(predicted: list[Cost], own: list[Trial], profile: Profile, speed: Speed) -> list[Cost]:
    """Predicted costs, corrected by how long trials of this task really took and what memory they had."""
    ratios = []
    for trial in own:
        if trial.status == "ok" and trial.device == speed.measured.get("device") and trial.seconds > 0:
            before = cost(trial.configuration, profile, speed, trial.budget)
            ratios.append((trial.seconds / before.seconds, trial.peak_memory_mb / before.peak_memory_mb))
    if not ratios:
        return predicted
    # The median of few ratios is drawn towards 1: as if one more trial had gone as predicted.
    share = len(ratios) / (len(ratios) + 1)
    time, memory = (math.exp(share * float(np.median(np.log(r)))) for r in zip(*ratios, strict=True))
    return [Cost(c.seconds * time, c.peak_memory_mb * memory, c.adapter_bytes, c.trained_parameters) for c in predicted]


def _feasible(candidates: list[dict[str, Any]], costs: list[Cost], settings: Settings) -> list[int]:
    limits = (
        ("max_seconds", settings.recommend.max_seconds, [c.seconds for c in costs], "s"),
        ("max_memory_mb", settings.recommend.max_memory_mb, [c.peak_memory_mb for c in costs], "MB"),
    )
    if not candidates:
        raise UserError(
            "every configuration known ran out of memory on this task; use a smaller batch or a smaller backbone"
        )
    left = list(range(len(candidates)))
    for name, limit, needs, unit in limits:
        if limit is None:
            continue
        least = min(left, key=lambda i: needs[i])
        already = "" if len(left) == len(candidates) else " of those that the other budget allows"
        left = [i for i in left if needs[i] <= limit]
        if not left:
            raise UserError(
                f"{name}={limit:g} excludes every configuration{already}: the smallest need is "
                f"{math.ceil(needs[least])} {unit} ({candidates[least]['method']}); raise it, or lower train.steps or"
                " the task's size"
            )
    return left


def _predict(
    mean: np.ndarray, covariance: np.ndarray, untuned: float, profile: Profile, tests: int
) -> tuple[list[Prediction], np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    gains = mean + random.standard_normal((DRAWS, len(mean))) @ root.T
    error = profile.features["zero_shot_standard_error"]
    start = np.clip(untuned + error * random.standard_normal((DRAWS, 1)), 0, 1)
    scores = beliefs.score(gains, start)
    sampling = np.sqrt(scores * (1 - scores) / max(1, tests)) * random.standard_normal(scores.shape)
    low, high = np.quantile(np.clip(scores + sampling, 0, 1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    top = scores.max(axis=1, keepdims=True)
    ties = scores == top
    best = (ties / ties.sum(axis=1, keepdims=True)).mean(axis=0)
    within = (scores >= top - 0.01).mean(axis=0)
    means = scores.mean(axis=0)
    rounded = [[round(float(x), 4) for x in column] for column in (means, low, high)]
    return [Prediction(*three) for three in zip(*rounded, strict=True)], best, within


def _utility(predictions: list[Prediction], costs: list[Cost], prefer: Prefer) -> list[float]:
    time, memory = WORTH[prefer]
    return [
        p.mean - time * math.log10(max(c.seconds, 1e-3)) - memory * math.log10(max(c.peak_memory_mb, 1.0))
        for p, c in zip(predictions, costs, strict=True)
    ]
