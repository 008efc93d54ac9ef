"""Parallel coordinates: one line per trial through its hyperparameters to what it reached and cost.

Methods do not share all hyperparameters: a line passes only the columns that its trial has. What both pictures (SVG and
PNG) draw is decided here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from metapeft.report import charts, wording
from metapeft.search import pareto
from metapeft.training.trial import Trial

LOGARITHMIC = 20.0  # numbers that differ by more are spread by their logarithm
SHORT = 11  # letters of a tick


@dataclass(frozen=True)
class Column:
    """place: trial -> 0 (bottom) to 1 (top), None where the trial has no such value. ticks: (place, text)."""

    name: str
    place: Callable[[Trial], float | None]
    ticks: list[tuple[float, str]]


def columns(trials: Sequence[Trial], most: int) -> list[Column]:
    """The method, up to `most` - 4 hyperparameters (that differ; of them those that most trials have), score, time and
    memory."""
    shown = [t for t in trials if pareto.objectives(t) is not None]
    methods = [m for m in wording.METHODS if any(t.method == m for t in shown)]
    methods += sorted({t.method for t in shown} - set(methods))
    names: dict[str, int] = {}
    for trial in shown:
        for name in pareto.searched(trial.method):
            if name in trial.configuration:
                names[name] = names.get(name, 0) + 1
    differ = [n for n in names if len({json.dumps(t.configuration.get(n)) for t in shown if n in t.configuration}) > 1]
    chosen = sorted(differ, key=lambda n: -names[n])[: max(0, most - 4)]
    points = {t.id: p for t in shown if (p := pareto.objectives(t)) is not None}
    found = [_categories("method", [wording.method(m) for m in methods], lambda t: wording.method(t.method))]
    found += [_hyperparameter(name, shown) for name in chosen]
    goals = (("score", 0, wording.score), ("time", 1, wording.duration), ("memory", 2, wording.memory))
    for name, index, say in goals:
        values = [p[index] for p in points.values()]
        found.append(_numbers(name, values, _value(points, index), say, logarithmic=index > 0))
    return found


def lines(
    trials: Sequence[Trial], found: Sequence[Column], adapters: bool = False
) -> list[tuple[Trial, list[tuple[int, float]]]]:
    """(trial, [(column, place), …]), those of the front (`pareto.front`) last: they are drawn on top."""
    front = {t.id for t in pareto.front(trials, adapters)}
    shown = [t for t in trials if pareto.objectives(t) is not None]
    shown.sort(key=lambda t: t.id in front)
    result = []
    for trial in shown:
        placed = [(i, place) for i, column in enumerate(found) if (place := column.place(trial)) is not None]
        result.append((trial, placed))
    return result


def chart(trials: Sequence[Trial], width: int, adapters: bool = False) -> str:
    """As inline SVG, "" for fewer than two trials with a result. A phone gets fewer columns."""
    trials = pareto.averaged(trials)
    if sum(pareto.objectives(t) is not None for t in trials) < 2:
        return ""
    found = columns(trials, 10 if width > 500 else 5)
    height, top = 360, 46.0
    bottom, left, right = height - 14.0, 46.0, width - 50.0
    step = (right - left) / (len(found) - 1)
    front, titles = {t.id for t in pareto.front(trials, adapters)}, pareto.titles(trials, adapters)
    body: list[str] = []
    for trial, placed in lines(trials, found, adapters):
        path = "M" + "L".join(f"{left + i * step:.1f} {bottom - place * (bottom - top):.1f}" for i, place in placed)
        kind = f"{'best' if trial.id in front else 'usual'} m-{escape(trial.method)}"
        body.append(
            f'<g class="mark line {kind}" tabindex="0" {charts.hover(trial, titles.get(trial.id, ""))}>'
            f'<path class="reach" d="{path}"/><path d="{path}"/></g>'
        )
    for index, column in enumerate(found):
        x = left + index * step
        body.append(charts.stroke("column", f"M{x:.1f} {top}V{bottom}"))
        high = top - 28 if index % 2 and step < 80 else top - 14
        body.append(charts.write("name", x, high, wording.spoken(column.name), "middle"))
        for place, said in column.ticks:
            body.append(charts.write("tick label", x + 4, bottom - place * (bottom - top) + 4, said))
    return charts.figure(width, height, "Every trial as a line through its settings, score, time and memory", body)


def _hyperparameter(name: str, trials: Sequence[Trial]) -> Column:
    values = [t.configuration[name] for t in trials if name in t.configuration]

    def value(trial: Trial) -> Any:
        return trial.configuration.get(name)

    if all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        if name == "layers":  # 0 means all of them
            said = sorted({v for v in values}, key=lambda n: n or math.inf)
            return _categories(name, [_long(name, v) for v in said], lambda t: _said(name, value(t)))
        small = min(values)
        spread = small > 0 and max(values) / small > LOGARITHMIC

        def number(trial: Trial) -> float | None:
            return value(trial)

        return _numbers(name, values, number, lambda v: _short(name, v), spread)
    said = sorted({_long(name, v) for v in values})
    return _categories(name, said, lambda t: _said(name, value(t)))


def _categories(name: str, values: Sequence[str], value: Callable[[Trial], str | None]) -> Column:
    places = {v: (i + 0.5) / len(values) for i, v in enumerate(values)}

    def place(trial: Trial) -> float | None:
        found = value(trial)
        return None if found is None else places[found]

    return Column(name, place, [(p, _cut(v)) for v, p in places.items()])


def _numbers(
    name: str,
    values: Sequence[float],
    value: Callable[[Trial], float | None],
    say: Callable[[float], str],
    logarithmic: bool,
) -> Column:
    logarithmic = logarithmic and min(values) > 0
    scale: Callable[[float], float] = math.log if logarithmic else float
    low, high = scale(min(values)), scale(max(values))

    def at(number: float) -> float:
        return (scale(number) - low) / (high - low) if high > low else 0.5

    def place(trial: Trial) -> float | None:
        found = value(trial)
        return None if found is None else at(found)

    middle = math.exp((low + high) / 2) if logarithmic else (low + high) / 2
    ticks = (
        [(0.0, say(min(values))), (0.5, say(middle)), (1.0, say(max(values)))] if high > low else [(0.5, say(middle))]
    )
    return Column(name, place, ticks)


def _value(points: dict[str, pareto.Point], index: int) -> Callable[[Trial], float | None]:
    def value(trial: Trial) -> float | None:
        return points[trial.id][index] if trial.id in points else None

    return value


def _said(name: str, value: Any) -> str | None:
    return None if value is None else _long(name, value)


def _long(name: str, value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else wording.hyperparameter(name, value)


def _short(name: str, value: Any) -> str:
    return _cut(_long(name, value))


def _cut(said: str) -> str:
    return said if len(said) <= SHORT else said[: SHORT - 1] + "…"
