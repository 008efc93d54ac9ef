"""Which configurations to use on a task, how good they will be, how sure that is, and what they cost.

Scores are those that `metapeft.meta.forecast` draws from the meta-model: what would be measured on the task's test
split if every configuration were trained once. `score` holds the 90 % interval and `likely` the 80 % one; `p_best`
and `p_within_1pct` are the chances to be the best of those listed, and within 0.01 of the best.

Evidence. Trials of the same task always count; trials of other tasks once there are LEAST_TASKS of them. With neither
the basis is "portfolio": too little evidence, the intervals say how little is known. Evidence on another backbone
counts for less, and the intervals are wider by what backbones may differ in. Where tuning has an even chance to win
nothing that matters over the untuned backbone, the advice is to leave it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.meta import costs, versions
from metapeft.meta.costs import Cost
from metapeft.meta.evidence import Configuration, Known, Observation, complete, families, key, plain
from metapeft.meta.experience import Experience
from metapeft.meta.forecast import CLOSE, forecast
from metapeft.meta.knowledge import Knowledge, knowledge
from metapeft.meta.model import Conditioned, Model
from metapeft.meta.portfolio import portfolio
from metapeft.meta.threads import one_thread
from metapeft.peft import METHODS
from metapeft.profiling import Profile
from metapeft.profiling import speed as speeds
from metapeft.profiling.shapes import Shapes
from metapeft.profiling.speed import Speed
from metapeft.progress import say
from metapeft.settings import Prefer, Settings
from metapeft.training.trial import Trial

Basis = Literal["experience", "portfolio"]
LEVEL, LIKELY = 0.9, 0.8
LEAST_TASKS = 5  # other tasks with trials before they say anything about this one
LEAST_SEEN = 3  # other tasks on which a configuration was tried before it is recommended
MOST_TRIED = 20  # configurations tried on this task that are listed beside the portfolio
MOST_OFTEN = 40  # and configurations tried on other tasks, the most often tried first
MOST_KNOWN = 2500  # observations of other tasks that a recommendation rests on
NEIGHBOURS = 5
TOGETHER = 3
FASTER, SMALLER = "lower train.steps or the task's size", "use shorter rows or a smaller backbone"
ENOUGH = 0.5  # chance that tuning gains nothing that matters, from which on it is not advised
# What a tenfold saving of (seconds, memory) is worth, in score.
WORTH: dict[Prefer, tuple[float, float]] = {
    "accuracy": (0.0, 0.0),
    "balanced": (0.02, 0.01),
    "speed": (0.2, 0.0),
    "memory": (0.0, 0.2),
}


@dataclass(frozen=True)
class Interval:
    """Holds the score to be measured with probability `level`."""

    low: float
    high: float
    level: float


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
    configuration: Configuration
    score: Prediction
    likely: Interval
    p_best: float
    p_within_1pct: float
    seconds: float
    peak_memory_mb: float
    adapter_bytes: int


@dataclass(frozen=True)
class Untuned:
    """The backbone as it is. p_enough: the chance that the first choice does not beat it by 0.01."""

    score: float
    standard_error: float
    p_enough: float


@dataclass(frozen=True)
class Neighbour:
    """A known task; similarity 1 fares like this one with every configuration, 0 says nothing. `best`: what worked
    there, with its score on the test split. examples: that it was trained on there."""

    task: str
    similarity: float
    best: dict[str, Any]  # method, configuration, score, untuned
    examples: int = 0


@dataclass(frozen=True)
class Recommendation:
    """`advice`: the answer in a sentence or two. `model`: version of the meta-model; `tasks`, `trials`: what it rests
    on. `together`: ranks of the TOGETHER configurations whose best is expected to be highest, when all are tried.
    `steps`: of the training that is predicted; `prefer`: what the ranks weigh; `metric`: what scores are of."""

    id: str
    task: str
    task_version: str
    backbone: str
    basis: Basis
    advice: str
    model: int
    tasks: int
    trials: int
    untuned: Untuned
    recommendations: tuple[Recommended, ...]
    neighbours: tuple[Neighbour, ...]
    together: tuple[int, ...] = ()
    steps: int = 0
    prefer: str = ""
    metric: str = ""

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        return record | {name: list(record[name]) for name in ("recommendations", "neighbours", "together")}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Recommendation:
        parts = {"score": Prediction, "likely": Interval}
        entries = [
            Recommended(**{**r, **{name: part(**r[name]) for name, part in parts.items()}})
            for r in record["recommendations"]
        ]
        return cls(
            **{
                **record,
                "untuned": Untuned(**record["untuned"]),
                "recommendations": tuple(entries),
                "neighbours": tuple(Neighbour(**n) for n in record["neighbours"]),
                "together": tuple(record.get("together", ())),  # those of before it was told have none
            }
        )


def recommend(
    task: Task,
    profile: Profile,
    settings: Settings,
    experience: Experience | None = None,
    speed: Speed | None = None,
    own: bool = True,
) -> Recommendation:
    """Ranked configurations, by expected score less what the preference makes of their cost.

    experience: None is the one in METAPEFT_HOME. speed: this machine's; None is the one that was measured together with
    the profile. own: whether trials of this very task count. Raises UserError when the budgets exclude every
    configuration.
    """
    speed = speed or speeds.read(profile.backbone_content) or nominal_speed(profile)
    version = versions.champion()
    known = knowledge(experience)
    place = (task.version, profile.backbone)
    trials = [t for t in known.trials if t.method in METHODS and (own or t.task_version != task.version)]
    mine = [t for t in trials if (t.task_version, t.backbone) == place]
    here = Known(
        task.version,
        profile.backbone,
        task.name,
        families().get(task.name, task.name),
        len(task.train),
        profile.features,
        task.metric,
    )
    evidence = counting(known, version.model, here, own)
    with one_thread():
        conditioned = _conditioned(version.model, evidence)
        others = [t for t in trials if t.task_version != task.version and t.backbone == profile.backbone]
        candidates = _candidates(profile.shapes, mine, others if len(evidence) else [])
        needs = costs.corrected(candidates, profile, speed, settings.train.steps, trials, known.profiles)
        feasible = _feasible(candidates, needs, settings)
        candidates, needs = [candidates[i] for i in feasible], [needs[i] for i in feasible]
        untuned, error, left_open = _untuned(mine, profile, task.metric)
        whole = [complete(c) for c in candidates]
        device = speed.measured.get("device", "")
        start = (untuned, left_open)
        told = forecast(conditioned, here, whole, settings.train.steps, start, len(task.test), device=device)
    penalty = _penalty(needs, settings.recommend.prefer)
    order = sorted(range(len(needs)), key=lambda i: (penalty[i] - told.mean[i], needs[i].seconds))
    bounds = {level: told.interval(level) for level in (LEVEL, LIKELY)}
    entries = tuple(
        Recommended(
            rank=rank,
            method=candidates[i]["method"],
            configuration=candidates[i],
            score=Prediction(_r(told.mean[i]), _r(bounds[LEVEL][0][i]), _r(bounds[LEVEL][1][i])),
            likely=Interval(_r(bounds[LIKELY][0][i]), _r(bounds[LIKELY][1][i]), LIKELY),
            p_best=_r(told.p_best[i]),
            p_within_1pct=_r(told.p_within[i]),
            seconds=round(needs[i].seconds, 1),
            peak_memory_mb=round(needs[i].peak_memory_mb, 1),
            adapter_bytes=needs[i].adapter_bytes,
        )
        for rank, i in enumerate(order, 1)
    )
    enough = _r(float((told.draws[:, order[0]] <= told.start + CLOSE).mean()))
    found = Recommendation(
        id="",
        task=task.name,
        task_version=task.version,
        backbone=profile.backbone,
        basis="experience" if evidence else "portfolio",
        advice="",
        model=version.number,
        tasks=len({o.task.name for o in evidence if o.task != here}),
        trials=sum(o.repeats for o in evidence),
        untuned=Untuned(_r(untuned), _r(error), enough),
        recommendations=entries,
        neighbours=neighbours(version.model, here, evidence),
        together=tuple(order.index(i) + 1 for i in told.together(TOGETHER, penalty)),
        steps=settings.train.steps,
        prefer=settings.recommend.prefer,
        metric=task.metric,
    )
    found = replace(found, advice=_advice(found, evidence))
    text = json.dumps(found.to_json(), sort_keys=True)
    return replace(found, id=hashlib.sha256(text.encode()).hexdigest()[:16])


def _r(value: float) -> float:
    return round(float(value), 4)


def counting(known: Knowledge, model: Model, here: Known, own: bool) -> list[Observation]:
    """What counts for a task: its own observations, with its profile as it is now, and those of enough other tasks."""
    observed = known.observations(model.remaining)
    mine = [replace(o, task=here) for o in observed if o.task == here] if own else []
    others = [o for o in observed if o.task.version != here.version]
    if len({o.task.version for o in others}) < LEAST_TASKS:
        others = []
    if len(others) > MOST_KNOWN:  # the backbone's own first, then all tasks alike
        order = np.random.default_rng(0).permutation(len(others))
        first = sorted(order, key=lambda i: others[i].task.backbone != here.backbone)[:MOST_KNOWN]
        others = [others[i] for i in sorted(first)]
    return [*mine, *others]


_last: list[tuple[Model, list[Observation], Conditioned]] = []


def _conditioned(model: Model, evidence: list[Observation]) -> Conditioned:
    """The last few are kept: a server is asked about one new task after another, by the same evidence."""
    features = [o.task.features for o in evidence]  # which do not count when observations are compared
    for before, same, found in _last:
        if before == model and same == evidence and [o.task.features for o in same] == features:
            return found
    found = Conditioned(model, evidence)
    _last.insert(0, (model, evidence, found))
    del _last[2:]
    return found


def _untuned(own: Sequence[Trial], profile: Profile, metric: str) -> tuple[float, float, float]:
    """The untuned backbone's score, its standard error, and what it leaves open about the score on the test split:
    nothing where it was measured there, else that same error of the profile's."""
    for trial in own:
        if trial.untuned_score is not None and trial.untuned_score.metric == metric:
            return trial.untuned_score.value, trial.untuned_score.standard_error, 0.0
    error = profile.features["zero_shot_standard_error"]
    return profile.features["zero_shot_score"], error, error


def _penalty(needs: list[Cost], prefer: Prefer) -> np.ndarray:
    """What the preference makes of each cost, in score."""
    time, memory = WORTH[prefer]
    logs = [(math.log10(max(c.seconds, 1e-3)), math.log10(max(c.peak_memory_mb, 1.0))) for c in needs]
    return np.array(logs) @ (time, memory)


def _advice(found: Recommendation, evidence: list[Observation]) -> str:
    first, untuned = found.recommendations[0], found.untuned
    said = []
    if untuned.p_enough >= ENOUGH:
        said.append(
            f"The untuned backbone ({untuned.score:.3f}) is probably good enough: {untuned.p_enough:.0%} sure that"
            f" {first.method} does not beat it by 0.01."
        )
    elif first.score.mean <= untuned.score:
        said.append(
            f"Perhaps leave the backbone untuned ({untuned.score:.3f}): {first.method}, the best of those listed, is"
            f" expected at {first.score.mean:.3f}; {untuned.p_enough:.0%} sure that it does not beat it by 0.01."
        )
    else:
        said.append(f"Use {first.method}; {first.p_within_1pct:.0%} sure that it is within 0.01 of the best listed.")
    if found.basis == "portfolio":
        said.append("There is too little evidence on other tasks: this is the portfolio, what usually does well.")
    elif evidence and all(o.task.backbone != found.backbone for o in evidence):
        said.append("All evidence is from other backbones: the intervals are wider for it.")
    return " ".join(said)


def neighbours(model: Model, here: Known, evidence: list[Observation]) -> tuple[Neighbour, ...]:
    """The tasks that are nearest by the learned metric, each at the size that is, with the best that was measured."""
    best: dict[Known, Observation] = {}
    for o in evidence:
        profiled = o.task != here and o.task.features is not None and o.task.backbone == here.backbone
        if profiled and math.isfinite(o.score) and (o.task not in best or o.score > best[o.task].score):
            best[o.task] = o
    if not best:
        return ()
    tasks = list(best)
    similarity = model.metric.similarity([here], tasks, model.length)[0]
    found = [
        Neighbour(
            task.name,
            _r(similarity[i]),
            {
                "method": best[task].configuration["method"],
                "configuration": short(plain(best[task].configuration)),
                "score": _r(best[task].score),
                "untuned": _r(best[task].untuned) if math.isfinite(best[task].untuned) else None,
            },
            task.train_examples,
        )
        for i, task in enumerate(tasks)
    ]
    found.sort(key=lambda n: (-n.similarity, n.task))
    nearest = {n.task: n for n in reversed(found)}  # of each task the nearest size
    return tuple(n for n in found if nearest[n.task] is n)[:NEIGHBOURS]


def nominal_speed(profile: Profile) -> Speed:
    """A guess for a machine that was never measured: 50 GFLOP/s of everything."""
    shapes, rate = profile.shapes, 5e10
    forward = 2 * sum(layer.parameters for layer in shapes.each()) / rate
    head = 2 * shapes.vocabulary * shapes.width / rate
    return Speed(forward, 2 * forward, head, 2 * head, 0.0, {})


def _candidates(shapes: Shapes, own: list[Trial], others: list[Trial]) -> list[Configuration]:
    """The portfolio, what was tried on this task, and what was tried on enough others; short forms, each once."""
    tried = [t for t in own if t.score or t.validation]
    tried = sorted(tried, key=lambda t: (-(t.score or t.validation).value, t.id))[:MOST_TRIED]  # type: ignore[union-attr]
    tasks: dict[str, set[str]] = {}
    configurations: dict[str, Configuration] = {}
    for trial in others:
        place = key(trial.configuration)
        tasks.setdefault(place, set()).add(trial.task_version)
        configurations.setdefault(place, trial.configuration)
    counts = Counter({place: len(seen) for place, seen in tasks.items() if len(seen) >= LEAST_SEEN})
    often = [configurations[place] for place in sorted(counts, key=lambda p: (-counts[p], p))[:MOST_OFTEN]]
    impossible = {key(t.configuration) for t in own if t.status == "out_of_memory"}
    impossible -= {key(t.configuration) for t in own if t.status == "ok"}  # elsewhere, or with more memory left
    found: dict[str, Configuration] = {}
    for configuration in (*portfolio(shapes.depth), *(t.configuration for t in tried), *often):
        place = key(configuration)
        if place not in impossible and shapes.takes(configuration["method"]):
            found.setdefault(place, short(plain(configuration)))
    return list(found.values())


def short(configuration: Configuration) -> Configuration:
    """Without the values that are defaults anyway, except method, learning rate and batch size."""
    usual = complete({"method": configuration["method"]})
    named = ("method", "learning_rate", "batch_size")
    chosen = complete(configuration)
    return {key: chosen[key] for key in chosen if key in named or chosen[key] != usual[key]}


def _feasible(candidates: list[Configuration], costs: list[Cost], settings: Settings) -> list[int]:
    limits = (
        ("max_seconds", settings.recommend.max_seconds, [c.seconds for c in costs], "s", FASTER),
        ("max_memory_mb", settings.recommend.max_memory_mb, [c.peak_memory_mb for c in costs], "MB", SMALLER),
    )
    if not candidates:
        raise UserError(
            "every configuration known ran out of memory on this task; use a smaller batch or a smaller backbone"
        )
    left = list(range(len(candidates)))
    for name, limit, needs, unit, remedy in limits:
        if limit is None:
            continue
        least = min(left, key=lambda i: needs[i])
        already = "" if len(left) == len(candidates) else " of those that the other budget allows"
        left = [i for i in left if needs[i] <= limit]
        if not left:
            raise UserError(
                f"{name}={limit:g} excludes every configuration{already}: the smallest need is "
                f"{math.ceil(needs[least])} {unit} ({candidates[least]['method']}); raise it, or {remedy}"
            )
    return left if settings.recommend.max_memory_mb is not None else _fitting(left, costs)


def _fitting(left: list[int], costs: list[Cost]) -> list[int]:
    """Those that this machine's memory holds; all of them, and a word of it, where it holds none. Whoever asks for
    another machine says its memory."""
    from metapeft.runtime import total_memory_mb

    here = total_memory_mb()
    fitting = [i for i in left if costs[i].peak_memory_mb <= here]
    if not fitting:
        least = min(costs[i].peak_memory_mb for i in left)
        say(f"no configuration fits into this machine's {here:.0f} MB: the smallest needs {least:.0f} MB; {SMALLER}")
    return fitting or left
