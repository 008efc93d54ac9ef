"""The trade-offs among trials: which are Pareto-optimal, which of them have a name, and how much of the space they
cover.

Objectives are always (score up, training seconds down, peak memory down). The score is that of the validation split:
the test split is for reporting, and choosing by it would flatter the choice.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metapeft.search import spaces
from metapeft.settings import DEFAULT_BACKBONE
from metapeft.training.trial import Score, Trial

Point = tuple[float, float, float]
NAMES = ("most accurate", "fastest", "smallest", "balanced")


def judged(trial: Trial) -> Score | None:
    """The score that search looks at: on the validation split, on the test split where no validation ran."""
    return trial.validation or trial.score


def objectives(trial: Trial) -> Point | None:
    """(score, training seconds, peak memory in MiB), or None where the trial did not end well or a number is not
    finite.
    """
    score = judged(trial)
    if trial.status != "ok" or score is None:
        return None
    point = (score.value, trial.train_seconds or trial.seconds, trial.peak_memory_mb)
    return point if all(map(math.isfinite, point)) else None


def dominates(a: Point, b: Point) -> bool:
    """At least as good everywhere and better somewhere."""
    return a != b and a[0] >= b[0] and a[1] <= b[1] and a[2] <= b[2]


def front(trials: Iterable[Trial]) -> list[Trial]:
    """The non-dominated trials, best score first. Equal ones are all kept; failed and unmeasured ones are left out."""
    points = [(point, trial) for trial in trials if (point := objectives(trial)) is not None]
    best = [(p, t) for p, t in points if not any(dominates(q, p) for q, _ in points)]
    best.sort(key=lambda item: (-item[0][0], item[0][1], item[0][2], item[1].id))
    return [trial for _, trial in best]


def staircase(points: Iterable[Point]) -> list[Point]:
    """What is best in score and seconds alone, from the fastest to the most accurate: the line in a picture."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p[1], -p[0])):
        if not best or point[0] > best[-1][0]:
            best.append(point)
    return best


def named(trials: Iterable[Trial]) -> dict[str, Trial]:
    """Name -> trial of the front (see NAMES); one trial may have several names.

    A point that is no better than the untuned backbone gets no name while a better one exists. Ties are broken by
    token-level loss for the score, by score for the others. "balanced" is the knee: nearest to the best of all three
    at once, with seconds and memory as logarithms, each scaled to the front's extent. Extents below the noise do not
    count in full: two standard errors of the score, a quarter more seconds or memory.
    """
    candidates = front(trials)
    useful = [t for t in candidates if t.score and t.untuned_score and t.score.value > t.untuned_score.value]
    candidates = useful or candidates
    if not candidates:
        return {}
    points = {t.id: _point(t) for t in candidates}
    accurate = min(candidates, key=lambda t: (-points[t.id][0], _loss(t), *points[t.id][1:]))
    error = judged(accurate).standard_error  # type: ignore[union-attr]
    costs = {i: (-p[0], math.log(max(p[1], 1e-9)), math.log(max(p[2], 1e-9))) for i, p in points.items()}
    floors = (2 * error if math.isfinite(error) else 0.0, math.log(1.25), math.log(1.25))
    lows = [min(c[k] for c in costs.values()) for k in range(3)]
    extents = [max(max(c[k] for c in costs.values()) - lows[k], floors[k], 1e-12) for k in range(3)]

    def distance(trial: Trial) -> float:
        return math.hypot(*((costs[trial.id][k] - lows[k]) / extents[k] for k in range(3)))

    return {
        "most accurate": accurate,
        "fastest": min(candidates, key=lambda t: (points[t.id][1], -points[t.id][0], _loss(t))),
        "smallest": min(candidates, key=lambda t: (points[t.id][2], t.adapter_bytes, -points[t.id][0], _loss(t))),
        "balanced": min(candidates, key=lambda t: (distance(t), -points[t.id][0], _loss(t))),
    }


def titles(trials: Iterable[Trial]) -> dict[str, str]:
    """Trial id -> its names on the front, in one text: {"ab12…": "fastest, smallest"}."""
    found: dict[str, list[str]] = {}
    for name, trial in named(trials).items():
        found.setdefault(trial.id, []).append(name)
    everything = len(NAMES)
    return {i: "best in everything" if len(names) == everything else ", ".join(names) for i, names in found.items()}


def hypervolume(points: Iterable[Sequence[float]], reference: Sequence[float]) -> float:
    """Exact volume that the points dominate up to `reference`; two or three objectives, all to be made small.

    Points that are not better than the reference everywhere add nothing. Three objectives are cut into slabs along the
    last one, in which the volume is an area (Fonseca et al. 2006, in its simplest form).
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
    if len(reference) != 3:
        raise ValueError(f"hypervolume takes two or three objectives, not {len(reference)}")
    levels = sorted({p[2] for p in inside})
    return sum(
        (top - low) * hypervolume([p[:2] for p in inside if p[2] <= low], reference[:2])
        for low, top in zip(levels, [*levels[1:], *reference[2:]], strict=False)
    )


def reference(trials: Iterable[Trial]) -> Point:
    """A point a tenth worse than the worst seconds and memory seen, at score 0: what `progress` measures from."""
    points = [p for t in trials if (p := objectives(t)) is not None]
    if not points:
        return (0.0, 1.0, 1.0)
    return (0.0, 1.1 * max(p[1] for p in points), 1.1 * max(p[2] for p in points))


def progress(trials: Sequence[Trial], worst: Point | None = None) -> list[float]:
    """Hypervolume after each trial, as a share of the box between `worst` and (score 1, no seconds, no memory).

    Give the same `worst` to compare sweeps. The default is `reference(trials)`.
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
    """One point of the front, for a table: what it is called, what it is, what it gives and costs, how to train it."""

    names: tuple[str, ...]
    trial: str
    method: str
    configuration: dict[str, Any]
    score: float
    standard_error: float
    test_score: float | None
    untuned_score: float | None
    seconds: float
    peak_memory_mb: float
    adapter_bytes: int
    command: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(trials: Iterable[Trial], task: str | None = None) -> list[Row]:
    """The front as rows, best score first. task: what the user calls the task on the command line (default: its
    name).
    """
    best = front(trials)
    names = named(best)
    rows = []
    for trial in best:
        score, seconds, memory = _point(trial)
        rows.append(
            Row(
                names=tuple(name for name in NAMES if names.get(name) is trial),
                trial=trial.id,
                method=trial.method,
                configuration=trial.configuration,
                score=score,
                standard_error=judged(trial).standard_error,  # type: ignore[union-attr]
                test_score=trial.score.value if trial.score else None,
                untuned_score=trial.untuned_score.value if trial.untuned_score else None,
                seconds=seconds,
                peak_memory_mb=memory,
                adapter_bytes=trial.adapter_bytes,
                command=command(trial, task),
            )
        )
    return rows


def searched(method: str) -> list[str]:
    """The hyperparameters that matter most: those that the method's declared space searches, in its order."""
    return list(spaces.space([method]).methods[method])


def command(trial: Trial, task: str | None = None) -> str:
    """The shell command that trains this trial again: same configuration, steps and seed.

    It sets everything that is searched, since `metapeft train` starts from the recommended configuration, and what
    else is not the default.
    """
    usual = spaces.defaults(trial.method)
    words = ["metapeft", "train", task or trial.task, "--method", trial.method, "--steps", str(trial.budget)]
    words += ["--backbone", trial.backbone] if trial.backbone != DEFAULT_BACKBONE else []
    words += ["--seed", str(trial.seed)] if trial.seed else []
    for name, value in trial.configuration.items():
        if name != "method" and (name in searched(trial.method) or usual.get(name) != value):
            words += [
                "--set",
                f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}",
            ]
    return shlex.join(words)


def _point(trial: Trial) -> Point:
    point = objectives(trial)
    assert point is not None, f"trial {trial.id} has no objectives"
    return point


def _loss(trial: Trial) -> float:
    loss = judged(trial).loss  # type: ignore[union-attr]
    return loss if math.isfinite(loss) else math.inf
