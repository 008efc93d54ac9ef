"""What to try next, so that the experience becomes a table: the same configurations on every task, and those first that
teach most per second.

What a choice among configurations needs to know is how they differ on a task, so the gain of a trial is taken relative
to the task's level:

    method + configuration + (method + configuration) x task + noise

with effects shared by tasks of a family and by the sizes of a task, and by configurations that are alike. A trial
is worth the variance that it takes from the whole table (Krause, Singh and Guestrin 2008 for why taking the best next
one is near the best order). A visit of a task is a few trials in a row, for loading a task costs too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metapeft.training.configuration import full

VISIT = 10  # trials of one task in a row: all methods can meet, and what they share is computed once
# Standard deviations of gains (the share of the untuned backbone's errors that tuning puts right), believed. SEED is
# what another seed changes; SAMPLING is to be divided by the root of the number of test examples.
METHOD, CONFIGURATION, TASK_METHOD, TASK_CONFIGURATION, SEED, SAMPLING = 0.1, 0.15, 0.1, 0.1, 0.05, 0.5
RATE_STEP = np.log(3.0)  # learning rates a factor of 3 apart share 60 % of their variance
DIFFERENT = 0.6  # what configurations that differ in one more hyperparameter still share
OTHER_SIZE = 0.8  # what a task's effects share with those on a sample of it half the size
SAME_FAMILY = 0.3  # share of a task's effects that are those of its family
REPEAT_EVERY = 8  # one visit in so many runs trials again with another seed, to measure noise


def _lora(learning_rate: float, rank: int, alpha: float, top_third: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"method": "lora", "learning_rate": learning_rate, "rank": rank, "alpha": alpha}
    return values | {"top_third": top_third}


def _adalora(learning_rate: float, initial_rank: int, target_rank: int, top_third: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"method": "adalora", "learning_rate": learning_rate, "initial_rank": initial_rank}
    return values | {"target_rank": target_rank, "top_third": top_third}


def _virtual(method: str, learning_rate: float, tokens: int, **values: Any) -> dict[str, Any]:
    return {"method": method, "learning_rate": learning_rate, "tokens": tokens, **values}


# The rows of the table. They never change: a table with other rows is another one. What they leave out are defaults.
FIRST: tuple[dict[str, Any], ...] = (
    _lora(3e-4, 8, 16.0, False),
    _lora(1e-3, 8, 16.0, True),
    _lora(1e-3, 8, 16.0, False),
    _lora(2e-3, 8, 16.0, True),
    _lora(5e-3, 4, 8.0, True),
    _adalora(1e-3, 12, 8, False),
    _adalora(3e-3, 12, 8, False),
    _adalora(3e-3, 12, 8, True),
    _adalora(1e-2, 6, 4, True),
    _virtual("prompt", 3e-3, 16),
    _virtual("prompt", 1e-2, 16),
    _virtual("prompt", 3e-2, 16),
    _virtual("prompt", 1e-2, 8, initialisation="vocabulary"),
    _virtual("prefix", 2e-3, 16),
    _virtual("prefix", 5e-3, 16),
    _virtual("prefix", 1e-2, 16),
    _virtual("prefix", 2e-2, 8),
    _virtual("p_tuning", 3e-4, 16, encoder="mlp"),
    _virtual("p_tuning", 1e-3, 16, encoder="mlp"),
    _virtual("p_tuning", 3e-3, 16, encoder="mlp"),
    _virtual("p_tuning", 1e-3, 32, encoder="mlp"),
)
LATER: tuple[dict[str, Any], ...] = (  # when the others are done everywhere
    _lora(1e-3, 32, 32.0, True),
    _adalora(1e-2, 12, 8, True),
    _virtual("prompt", 3e-2, 32),
    _virtual("prefix", 5e-3, 32),
    _virtual("p_tuning", 1e-3, 16, encoder="lstm"),
    # Beyond the highest learning rates above, which do best on many tasks.
    _lora(2e-3, 8, 16.0, False),
    _adalora(1e-2, 12, 8, False),
    _virtual("prompt", 1e-1, 16),
    _virtual("prefix", 3e-2, 16),
    _virtual("p_tuning", 1e-2, 16, encoder="mlp"),
)
CONFIGURATIONS = (*FIRST, *LATER)


def configurations(depth: int) -> list[dict[str, Any]]:
    """The table's rows for a backbone of `depth` layers, every default written out."""
    rows = []
    for row in CONFIGURATIONS:
        values = {name: value for name, value in row.items() if name != "top_third"}
        rows.append(full(values | ({"layers": max(1, round(depth / 3))} if row.get("top_third") else {})))
    return rows


@dataclass(frozen=True)
class Place:
    """A task at one size, and what visiting it costs beside the trials."""

    task: str
    family: str
    train_examples: int
    test_examples: int
    overhead: float  # seconds

    @property
    def noise(self) -> float:
        """Variance of a measured gain."""
        return SEED**2 + SAMPLING**2 / max(1, self.test_examples)


@dataclass(frozen=True)
class Cell:
    """One possible trial. `place` is an index; `later`: after all that are not; `repeats`: the same was planned with
    another seed."""

    id: str
    place: int
    configuration: dict[str, Any]
    seed: int
    seconds: float
    memory_mb: float = 0.0
    later: bool = False
    repeats: bool = False


class Plan:
    """All cells of the table; `visit` says which are next."""

    def __init__(self, places: Sequence[Place], cells: Sequence[Cell]):
        self.places, self.cells = list(places), list(cells)
        self._covariance = covariance(self.places, self.cells)

    def seconds(self, done: Collection[str]) -> float:
        """Predicted, for all that is not done."""
        left = [cell for cell in self.cells if cell.id not in done]
        visits = Counter(cell.place for cell in left)
        overhead = sum(self.places[place].overhead * -(-count // VISIT) for place, count in visits.items())
        return overhead + sum(cell.seconds for cell in left)

    def visit(self, done: Collection[str], remaining: float = float("inf"), visits: int = 0) -> list[Cell]:
        """The next few cells of one place, best first; empty when nothing is left that fits into `remaining` seconds.

        done: ids of trials that exist or that somebody else is running. visits: how many there were before.
        """
        open_ = [i for i, c in enumerate(self.cells) if c.id not in done and c.seconds <= remaining]
        repeats = [i for i in open_ if self.cells[i].repeats and self._first(i) in done]
        rest = [i for i in open_ if not self.cells[i].repeats]
        news = [i for i in rest if not self.cells[i].later] or rest
        if repeats and (not news or visits % REPEAT_EVERY == REPEAT_EVERY - 1):
            repeated = Counter(c.place for c in self.cells if c.repeats and c.id in done)
            where = min(repeats, key=lambda i: (repeated[self.cells[i].place], self.cells[i].seconds))
            return self._within([i for i in repeats if self.cells[i].place == self.cells[where].place], remaining)
        return self._best(news, [i for i, c in enumerate(self.cells) if c.id in done], remaining)

    def _best(self, open_: list[int], known: list[int], remaining: float) -> list[Cell]:
        """The visit that takes most variance from the table per second."""
        covariance = self._covariance
        if known:
            noises = [self.places[self.cells[i].place].noise for i in known]
            inside = covariance[np.ix_(known, known)] + np.diag(noises)
            covariance = covariance - covariance[:, known] @ np.linalg.solve(inside, covariance[known])
        best: tuple[float, list[int]] = (0.0, [])
        for place, facts in enumerate(self.places):
            rows = [i for i in open_ if self.cells[i].place == place]
            seconds = np.array([self.cells[i].seconds for i in rows])
            columns = covariance[:, rows]
            chosen: list[int] = []
            removed, spent = 0.0, facts.overhead
            while len(chosen) < min(VISIT, len(rows)):
                variances = columns[rows, range(len(rows))] + facts.noise
                worth = (columns**2).sum(axis=0) / variances
                worth[chosen] = -1.0
                worth[seconds > remaining - spent] = -1.0
                pick = int(np.argmax(worth / seconds))
                if worth[pick] < 0:
                    break
                chosen.append(pick)
                removed, spent = removed + float(worth[pick]), spent + float(seconds[pick])
                columns = columns - np.outer(columns[:, pick], columns[rows[pick]]) / variances[pick]
            if chosen and removed / spent > best[0]:
                best = removed / spent, [rows[i] for i in chosen]
        return [self.cells[i] for i in best[1]]

    def _within(self, rows: list[int], remaining: float) -> list[Cell]:
        chosen: list[Cell] = []
        for i in rows[:VISIT]:
            remaining -= self.cells[i].seconds
            if remaining >= 0:
                chosen.append(self.cells[i])
        return chosen

    def _first(self, repeat: int) -> str:
        """The trial that a repetition repeats."""
        this = self.cells[repeat]
        same = (c for c in self.cells if c.place == this.place and c.configuration == this.configuration)
        return next(c.id for c in same if not c.repeats)


def covariance(places: Sequence[Place], cells: Sequence[Cell]) -> np.ndarray:
    """(cells, cells): what the gains of two cells, relative to their task's levels, have in common."""
    configurations = [cell.configuration for cell in cells]
    distinct = {id(c): c for c in configurations}
    order = {key: i for i, key in enumerate(distinct)}
    which = [order[id(c)] for c in configurations]
    method, alike = likeness(list(distinct.values()))
    method, alike = method[np.ix_(which, which)], alike[np.ix_(which, which)]
    where = [cell.place for cell in cells]
    related = relation(places)[np.ix_(where, where)]
    general = METHOD**2 * method + CONFIGURATION**2 * alike
    special = TASK_METHOD**2 * method + TASK_CONFIGURATION**2 * alike
    return np.asarray(general + related * special)


def likeness(configurations: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(same method, how alike within a method), both square and in [0, 1]."""
    methods = [c["method"] for c in configurations]
    same = np.array([[float(a == b) for b in methods] for a in methods])
    rates = np.log([c["learning_rate"] for c in configurations])
    differing = np.array([[_differing(a, b) for b in configurations] for a in configurations])
    close = np.exp(-0.5 * (np.subtract.outer(rates, rates) / RATE_STEP) ** 2) * DIFFERENT**differing
    return same, same * close


def _differing(a: dict[str, Any], b: dict[str, Any]) -> int:
    return sum(a[name] != b.get(name) for name in a if name not in ("method", "learning_rate"))


def relation(places: Sequence[Place]) -> np.ndarray:
    """(places, places) in [0, 1]: how much of a task's own effects two places share."""
    task = np.array([[float(a.task == b.task) for b in places] for a in places])
    family = np.array([[float(a.family == b.family) for b in places] for a in places])
    sizes = np.log2([max(1, p.train_examples) for p in places])
    other = OTHER_SIZE ** np.abs(np.subtract.outer(sizes, sizes))
    return np.asarray(SAME_FAMILY * family + (1 - SAME_FAMILY) * task * other)
