"""The plan: one table, cheap and telling cells first, whatever was done before."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from metapeft.meta import plan as module
from metapeft.meta.plan import CONFIGURATIONS, FIRST, VISIT, Cell, Place, Plan, configurations, covariance
from metapeft.peft.base import METHODS


def table(tasks: int = 6, seconds: float = 10.0, repeats: bool = False) -> Plan:
    """`tasks` tasks of three families; task n costs (1 + n / 10) times `seconds` a trial."""
    places = [Place(f"task{n}", f"family{n % 3}", 600, 300, 2.0) for n in range(tasks)]
    cells = []
    for n in range(tasks):
        for k, row in enumerate(configurations(30)):
            cell = Cell(f"{n}-{k}", n, row, 0, seconds * (1 + n / 10))
            cells.append(cell)
            if repeats and n % 2:
                cells.append(replace(cell, id=cell.id + "-again", seed=1, repeats=True))
    return Plan(places, cells)


def test_rows_vary_the_learning_rate_of_every_method() -> None:
    rows = configurations(30)
    assert len(rows) == len(CONFIGURATIONS) == len({str(row) for row in rows})
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        rates = sorted({row["learning_rate"] for row in own})
        assert len(own) >= 4 and len(rates) >= 3 and rates[-1] >= 3 * rates[0]
    assert {row["layers"] for row in rows if "layers" in row} == {0, 10}
    assert {row["layers"] for row in configurations(6) if "layers" in row} == {0, 2}


def test_the_best_visit_is_the_one_that_brute_force_finds() -> None:
    """Of single trials: the variance left in the whole table, computed from its definition."""
    plan = table(tasks=3)
    prior = covariance(plan.places, plan.cells)
    known = [3, 40, 41]

    def left(rows: list[int]) -> float:
        inside = prior[np.ix_(rows, rows)] + plan.places[0].noise * np.eye(len(rows))
        return float(np.trace(prior - prior[:, rows] @ np.linalg.inv(inside) @ prior[rows]))

    worth = [(left(known) - left([*known, i])) / c.seconds for i, c in enumerate(plan.cells)]
    worth = [-1.0 if i in known else w for i, w in enumerate(worth)]
    [first, *_] = plan.visit({plan.cells[i].id for i in known})
    of_place = [w for w, c in zip(worth, plan.cells, strict=True) if c.place == first.place]
    assert worth[plan.cells.index(first)] == pytest.approx(max(of_place), rel=1e-9)


def test_every_beginning_of_the_order_is_balanced() -> None:
    plan, done = table(tasks=8), set[str]()
    methods = defaultdict(set)
    for visits in range(8):
        for cell in plan.visit(done, visits=visits):
            done.add(cell.id)
            methods[cell.place].add(cell.configuration["method"])
    assert sum(len(m) == len(METHODS) for m in methods.values()) >= 5  # eight visits: most tasks, with all methods
    counts = [sum(c.configuration["method"] == m for c in plan.cells if c.id in done) for m in METHODS]
    assert max(counts) <= 2 * min(counts)


def test_what_is_cheap_comes_first_and_what_does_not_fit_never() -> None:
    plan = table(tasks=3)
    assert {cell.place for cell in plan.visit(set())} == {0}
    few = plan.visit(set(), remaining=25.0)
    assert few and sum(cell.seconds for cell in few) + plan.places[few[0].place].overhead <= 25.0
    assert plan.visit(set(), remaining=5.0) == []


def test_the_whole_table_is_visited_once_in_an_order_of_its_own() -> None:
    orders = []
    for _ in range(2):
        plan, order = table(tasks=2, repeats=True), list[str]()
        while visit := plan.visit(set(order), visits=len(order) // VISIT):
            assert len({cell.place for cell in visit}) == 1 and len(visit) <= VISIT
            order += [cell.id for cell in visit]
        assert sorted(order) == sorted(cell.id for cell in plan.cells)
        orders.append(order)
    assert orders[0] == orders[1]


def test_only_what_was_measured_is_repeated_and_every_eighth_visit_repeats() -> None:
    plan, done = table(tasks=4, repeats=True), set[str]()
    assert not any(cell.repeats for cell in plan.visit(done, visits=module.REPEAT_EVERY - 1))
    for cell in plan.cells:
        if cell.place == 1 and not cell.repeats:
            done.add(cell.id)
    again = plan.visit(done, visits=module.REPEAT_EVERY - 1)
    assert again and all(cell.repeats and cell.place == 1 for cell in again)
    assert not any(cell.repeats for cell in plan.visit(done, visits=0))


def test_covariance_is_one() -> None:
    plan = table(tasks=4)
    small = [replace(place, train_examples=64) for place in plan.places[:2]]
    cells = plan.cells + [replace(c, place=c.place + 4) for c in plan.cells if c.place < 2]
    matrix = covariance([*plan.places, *small], cells)
    assert np.allclose(matrix, matrix.T) and np.linalg.eigvalsh(matrix).min() > -1e-9
    row = {(c.place, c.id.split("-")[1]): i for i, c in enumerate(cells)}
    same_task, other_task = matrix[row[0, "1"], row[4, "1"]], matrix[row[0, "1"], row[1, "1"]]
    same_family = matrix[row[0, "1"], row[3, "1"]]
    assert matrix[row[0, "1"], row[0, "1"]] > same_task > same_family > other_task > 0


def test_later_rows_come_when_the_first_are_done_everywhere() -> None:
    places = [Place(f"task{n}", f"family{n}", 600, 300, 2.0) for n in range(2)]
    rows = list(enumerate(configurations(30)))
    cells = [Cell(f"{n}-{k}", n, row, 0, 10.0, later=k >= len(FIRST)) for n in (0, 1) for k, row in rows]
    plan, order = Plan(places, cells), list[Cell]()
    while visit := plan.visit({cell.id for cell in order}):
        order += visit
    assert [cell.later for cell in order] == sorted(cell.later for cell in order)
    assert len(order) == len(cells) and any(cell.later for cell in order)
    counts = [sum(row["method"] == method for row in FIRST) for method in METHODS]
    assert min(counts) >= 4  # so that the first part is a table already
