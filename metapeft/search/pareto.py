"""The trade-offs among trials: which are Pareto-optimal, which of them have a name, and how much of the space they
cover.

Objectives are (score up, training seconds down, peak memory down), and where it is asked for (adapter bytes down). The
score is that of the validation split: the test split is for reporting, and choosing by it would flatter the choice.
Trials that repeat a configuration with another seed count as one, their mean: a front of single trials would show the
luckiest ones.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from metapeft.search import spaces
from metapeft.settings import DEFAULT_BACKBONE
from metapeft.training.trial import Score, Trial

Point = tuple[float, ...]
NAMES = ("most accurate", "fastest", "smallest", "balanced")
# By what the settings prefer (`recommend.prefer`).
PREFERRED = {"accuracy": "most accurate", "balanced": "balanced", "speed": "fastest", "memory": "smallest"}


def judged(trial: Trial) -> Score | None:
    """The score that search looks at: on the validation split, on the test split where no validation ran."""
    return trial.validation or trial.score


@dataclass
class Repeated(Trial):
    """A configuration that ran with several seeds, as one trial: the first one's record with the mean of its scores,
    seconds and memory. `runs` are the trials.

    The standard error is that of the mean over seeds on this validation split, and of the split itself: repeating takes
    out the luck of a seed, not that of a small split.
    """

    runs: tuple[Trial, ...] = ()


def averaged(trials: Iterable[Trial]) -> list[Trial]:
    """Each configuration (with its steps) once, in the order of their first trials. Only measured trials are joined."""
    groups: list[list[Trial]] = []
    known: dict[str, list[list[Trial]]] = {}
    for trial in trials:
        key = json.dumps([trial.task_version, trial.backbone, trial.configuration, trial.budget], sort_keys=True)
        same = known.setdefault(key, []) if trial.status == "ok" and judged(trial) else []
        group = next((g for g in same if all(t.seed != trial.seed for t in g)), None)
        if group is None:
            group = []
            same.append(group)
            groups.append(group)
        group.append(trial)
    return [_joined(group) if len(group) > 1 else group[0] for group in groups]


def runs(trial: Trial) -> tuple[Trial, ...]:
    """The trainings behind a trial: itself, or those that it is the mean of."""
    return trial.runs if isinstance(trial, Repeated) else (trial,)


def seed_deviation(trials: Iterable[Trial]) -> float:
    """Standard deviation of a score between seeds, pooled over repeated configurations; NaN without any."""
    squares, freedom = 0.0, 0
    for trial in averaged(trials):
        values = [found.value for run in runs(trial) if (found := judged(run)) is not None]
        if len(values) > 1:
            squares += statistics.variance(values) * (len(values) - 1)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def better(a: Trial, b: Trial, deviation: float = math.nan) -> float:
    """The probability that `a` truly scores higher than `b`, from their standard errors.

    deviation: between seeds, for configurations that ran with one (`seed_deviation`); NaN counts as none. Both errors
    count as independent. They are not quite, on the same validation examples: the truth is rather more certain.
    """
    first, second = judged(a), judged(b)
    if first is None or second is None:
        return math.nan
    variance = first.standard_error**2 + second.standard_error**2
    variance += sum(deviation**2 for t in (a, b) if len(runs(t)) == 1 and math.isfinite(deviation))
    if not variance > 0:
        return 0.5 + 0.5 * ((first.value > second.value) - (first.value < second.value))
    return 0.5 * (1 + math.erf((first.value - second.value) / math.sqrt(2 * variance)))


def objectives(trial: Trial, adapters: bool = False) -> Point | None:
    """(score, training seconds, peak memory in MiB), with `adapters` also (…, bytes of the adapter); None where the
    trial did not end well or a number is not finite.
    """
    score = judged(trial)
    if trial.status != "ok" or score is None:
        return None
    point: Point = (score.value, trial.train_seconds or trial.seconds, trial.peak_memory_mb)
    point += (float(trial.adapter_bytes),) if adapters else ()
    return point if all(map(math.isfinite, point)) else None


def dominates(a: Point, b: Point) -> bool:
    """At least as good everywhere and better somewhere."""
    return a != b and a[0] >= b[0] and all(x <= y for x, y in zip(a[1:], b[1:], strict=True))


def front(trials: Iterable[Trial], adapters: bool = False) -> list[Trial]:
    """The non-dominated trials, best score first. Equal ones are all kept; failed and unmeasured ones are left out.

    Repeated configurations appear once (`averaged`). adapters: small adapters count too.
    """
    points = [(point, trial) for trial in averaged(trials) if (point := objectives(trial, adapters)) is not None]
    best = [(p, t) for p, t in points if not any(dominates(q, p) for q, _ in points)]
    best.sort(key=lambda item: (-item[0][0], *item[0][1:], item[1].id))
    return [trial for _, trial in best]


def staircase(points: Iterable[Point]) -> list[Point]:
    """What is best in score and seconds alone, from the fastest to the most accurate: the line in a picture."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p[1], -p[0])):
        if not best or point[0] > best[-1][0]:
            best.append(point)
    return best


def named(trials: Iterable[Trial], adapters: bool = False) -> dict[str, Trial]:
    """Name -> trial of the front (see NAMES); one trial may have several names.

    A point that is no better than the untuned backbone gets no name while a better one exists. Ties are broken by
    token-level loss for the score, by score for the others. "balanced" is the knee: nearest to the best of all
    objectives at once, with costs as logarithms, each scaled to the front's extent. Extents below the noise do not
    count in full: two standard errors of the score, a quarter more of a cost.
    """
    candidates = front(trials, adapters)
    useful = [t for t in candidates if t.untuned_score and _reached(t) > t.untuned_score.value]
    candidates = useful or candidates
    if not candidates:
        return {}
    points = {t.id: _point(t) for t in candidates}
    accurate = min(candidates, key=lambda t: (-points[t.id][0], _loss(t), *points[t.id][1:]))
    error = judged(accurate).standard_error  # type: ignore[union-attr]
    sizes = {t.id: (float(t.adapter_bytes),) if adapters else () for t in candidates}
    costs = {i: (-p[0], *(math.log(max(x, 1e-9)) for x in p[1:] + sizes[i])) for i, p in points.items()}
    dimensions = range(4 if adapters else 3)
    floors = (2 * error if math.isfinite(error) else 0.0, *[math.log(1.25)] * 3)
    lows = [min(c[k] for c in costs.values()) for k in dimensions]
    extents = [max(max(c[k] for c in costs.values()) - lows[k], floors[k], 1e-12) for k in dimensions]

    def distance(trial: Trial) -> float:
        return math.hypot(*((costs[trial.id][k] - lows[k]) / extents[k] for k in dimensions))

    return {
        "most accurate": accurate,
        "fastest": min(candidates, key=lambda t: (points[t.id][1], -points[t.id][0], _loss(t))),
        "smallest": min(candidates, key=lambda t: (points[t.id][2], t.adapter_bytes, -points[t.id][0], _loss(t))),
        "balanced": min(candidates, key=lambda t: (distance(t), -points[t.id][0], _loss(t))),
    }


def titles(trials: Iterable[Trial], adapters: bool = False) -> dict[str, str]:
    """Trial id -> its names on the front, in one text: {"ab12…": "fastest, smallest"}."""
    found: dict[str, list[str]] = {}
    for name, trial in named(trials, adapters).items():
        found.setdefault(trial.id, []).append(name)
    everything = len(NAMES)
    return {i: "best in everything" if len(names) == everything else ", ".join(names) for i, names in found.items()}


def hypervolume(points: Iterable[Sequence[float]], reference: Sequence[float]) -> float:
    """Exact volume that the points dominate up to `reference`; two or more objectives, all to be made small.

    Points that are not better than the reference everywhere add nothing. More than two objectives are cut into slabs
    along the last one, in which there is one objective less (Fonseca et al. 2006, in its simplest form).
    """
    inside = [
        tuple(p) for p in points if all(map(math.isfinite, p)) and all(x < r for x, r in zip(p, reference, strict=True))
    ]
    if len(reference) == 2:
        area, ceiling = 0.0, reference[1]
        for x, y in sorted(inside):
            if y < ceiling:
                area += (reference[0] - x) * (ceiling - y)
                ceiling = y
        return area
    if len(reference) < 2:
        raise ValueError(f"hypervolume takes two objectives or more, not {len(reference)}")
    levels = sorted({p[-1] for p in inside})
    return sum(
        (top - low) * hypervolume([p[:-1] for p in inside if p[-1] <= low], reference[:-1])
        for low, top in zip(levels, [*levels[1:], reference[-1]], strict=False)
    )


def reference(trials: Iterable[Trial]) -> Point:
    """A point a tenth worse than the worst seconds and memory seen, at score 0: what `progress` measures from."""
    points = [p for t in trials if (p := objectives(t)) is not None]
    if not points:
        return (0.0, 1.0, 1.0)
    return (0.0, 1.1 * max(p[1] for p in points), 1.1 * max(p[2] for p in points))


def progress(trials: Sequence[Trial], worst: Point | None = None) -> list[float]:
    """Hypervolume after each trial, as a share of the box between `worst` and (score 1, no seconds, no memory).

    Give the same `worst` to compare sweeps. The default is `reference(trials)`. Every trial counts for itself, so a
    repeat cannot make it fall.
    """
    worst = worst or reference(trials)
    shares: list[float] = []
    points: list[tuple[float, float, float]] = []
    for trial in trials:
        if (point := objectives(trial)) is not None:
            points.append((1 - point[0], point[1] / worst[1], point[2] / worst[2]))
        share = hypervolume(points, (1 - worst[0], 1.0, 1.0))
        shares.append(max([share, *shares[-1:]]))  # rounding must not make it fall
    return shares


@dataclass(frozen=True)
class Row:
    """One point of the front, for a table: what it is called, what it is, what it gives and costs, how to train it.

    `runs` seeds were averaged. `p_above_next` is the probability that it truly scores above the next row (None for the
    last one).
    """

    names: tuple[str, ...]
    trial: str
    method: str
    configuration: dict[str, Any]
    score: float
    standard_error: float
    runs: int
    p_above_next: float | None
    test_score: float | None
    untuned_score: float | None
    seconds: float
    peak_memory_mb: float
    adapter_bytes: int
    command: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(trials: Iterable[Trial], task: str | None = None, adapters: bool = False) -> list[Row]:
    """The front as rows, best score first. task: what the user calls the task on the command line (default: its
    name). adapters: small adapters count too.
    """
    trials = list(trials)
    best, deviation = front(trials, adapters), seed_deviation(trials)
    names = named(best, adapters)
    rows = []
    for trial, following in zip(best, [*best[1:], None][: len(best)], strict=True):
        score, seconds, memory = _point(trial)
        rows.append(
            Row(
                names=tuple(name for name in NAMES if names.get(name) is trial),
                trial=trial.id,
                method=trial.method,
                configuration=trial.configuration,
                score=score,
                standard_error=judged(trial).standard_error,  # type: ignore[union-attr]
                runs=len(runs(trial)),
                p_above_next=better(trial, following, deviation) if following else None,
                test_score=trial.score.value if trial.score else None,
                untuned_score=trial.untuned_score.value if trial.untuned_score else None,
                seconds=seconds,
                peak_memory_mb=memory,
                adapter_bytes=trial.adapter_bytes,
                command=command(trial, task, trials),
            )
        )
    return rows


def searched(method: str) -> list[str]:
    """The hyperparameters that matter most: those that the method's declared space searches, in its order."""
    return list(spaces.space([method]).methods[method])


def command(trial: Trial, task: str | None = None, beside: Iterable[Trial] = ()) -> str:
    """The shell command that trains this trial again: same configuration, steps and seed.

    It sets everything that is searched, since `metapeft train` starts from the recommended configuration or from that
    of another trial of the sweep (`beside`), and what else is not the default in it or in one of those.
    """
    switched = "start" in trial.configuration  # a training that could exchange its method: where it began
    chosen = trial.configuration["start"] if switched else trial.configuration
    method = chosen["method"]
    usual = spaces.defaults(method)
    words = ["metapeft", "train", task or trial.task, "--method", method, "--steps", str(trial.budget)]
    words += ["--switch"] if switched else []
    words += ["--backbone", trial.backbone] if trial.backbone != DEFAULT_BACKBONE else []
    words += ["--seed", str(trial.seed)] if trial.seed else []
    others = [other.configuration for other in beside if other.method == method]
    for name, value in chosen.items():
        varied = any(usual.get(name) != other.get(name, usual.get(name)) for other in (chosen, *others))
        if name != "method" and (name in searched(method) or varied):
            words += [
                "--set",
                f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}",
            ]
    return shlex.join(words)


def _joined(group: Sequence[Trial]) -> Repeated:
    """Trials of one configuration, as their mean."""
    scores = [score for t in group if (score := judged(t)) is not None]
    values = [score.value for score in scores]
    sampling = statistics.fmean(score.standard_error for score in scores)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    loss = statistics.fmean(score.loss for score in scores)
    mean = Score(scores[0].metric, statistics.fmean(values), math.hypot(sampling, spread), scores[0].n, loss)
    record = {f.name: getattr(group[0], f.name) for f in fields(Trial)}
    record["validation"] = mean
    for name in ("seconds", "train_seconds", "peak_memory_mb"):
        record[name] = statistics.fmean(getattr(t, name) for t in group)
    return Repeated(**record, runs=tuple(group))


def _point(trial: Trial) -> tuple[float, float, float]:
    point = objectives(trial)
    assert point is not None, f"trial {trial.id} has no objectives"
    return point[0], point[1], point[2]


def _reached(trial: Trial) -> float:
    """The validation score, though the untuned one beside it is the test split's: that split chooses nothing."""
    found = judged(trial)
    return found.value if found else -math.inf


def _loss(trial: Trial) -> float:
    loss = judged(trial).loss  # type: ignore[union-attr]
    return loss if math.isfinite(loss) else math.inf
