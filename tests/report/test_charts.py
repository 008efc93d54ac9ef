from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.report import charts, parallel
from metapeft.search import pareto
from metapeft.training.trial import Trial
from tests.report.examples import TASK, trials
from tests.search import surrogate


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def marks(svg: str) -> dict[str, ET.Element]:
    found = [e for e in parse(svg).iter("g") if "mark" in (e.get("class") or "").split()]
    return {str(e.get("data-trial")): e for e in found}


@pytest.mark.parametrize("width", [820, 358])
def test_dots_are_where_their_numbers_say(width: int) -> None:
    done = trials()
    drawn = marks(charts.trade_offs(done, width, 0.55))
    points = {t.id: p for t in done if (p := pareto.objectives(t))}
    assert set(drawn) == set(points)
    circles = {i: next(e.iter("circle")) for i, e in drawn.items()}
    place = {i: tuple(float(c.get(name, "")) for name in ("cx", "cy", "r")) for i, c in circles.items()}
    for a in points:
        for b in points:
            if points[a][1] < points[b][1]:
                assert place[a][0] <= place[b][0] + 0.11
            if points[a][0] < points[b][0]:
                assert place[a][1] >= place[b][1] - 0.11
            if points[a][2] < points[b][2]:
                assert place[a][2] <= place[b][2] + 0.11
    for x, y, r in place.values():
        assert x - r >= 52 and x + r <= width - 16 and 0 < y < 340
    front = {t.id for t in pareto.front(done)}
    assert {i for i, e in drawn.items() if "front" in str(e.get("class")).split()} == front


@pytest.mark.parametrize("width", [820, 358])
def test_labels_name_the_points_and_stay_apart(width: int) -> None:
    done = trials()
    root = parse(charts.trade_offs(done, width))
    labels = [e for e in root.iter("text") if e.get("class") == "label"]
    assert sorted(e.text or "" for e in labels) == sorted(pareto.titles(done).values())
    boxes = []
    for label in labels:
        x, y, wide = float(label.get("x", "")), float(label.get("y", "")), charts.CHARACTER * len(label.text or "")
        assert x >= 52 and x + wide <= width - 16
        boxes.append(charts.Box(x, y - 11, x + wide, y + 3))
    assert not any(a.meets(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("quantity", ["validation_score", "validation_loss"])
def test_a_line_per_trial_with_a_curve_the_best_on_top(quantity: str) -> None:
    done = trials()
    best = next(t.id for t in done if t.status == "ok")
    drawn = marks(charts.curves(done, 820, quantity, 0.5, best))
    assert set(drawn) == {t.id for t in done if t.status == "ok"}, "one measurement before diverging is no curve"
    assert list(drawn)[-1] == best and "best" in str(drawn[best].get("class")).split()
    for trial in done:
        if trial.id in drawn:
            assert len(list(drawn[trial.id].iter("circle"))) == len(trial.curve)


def test_losses_of_every_size_are_told_apart() -> None:
    """Logarithmic: neither one that exploded nor one near zero flattens the others."""
    done = [t for t in trials() if t.status == "ok"][:3]
    for trial, loss in zip(done, (500.0, 0.5, 0.0), strict=True):
        trial.curve[-1]["validation_loss"] = loss
    drawn = marks(charts.curves(done, 820, "validation_loss"))
    ends = [float(list(drawn[t.id].iter("circle"))[-1].get("cy", "")) for t in done]
    assert ends[0] + 30 < ends[1] < ends[2] - 30 and ends[0] > 0 and ends[2] < 280


def test_nothing_to_draw() -> None:
    assert charts.trade_offs([], 820) == "" and charts.curves([], 820, "validation_loss") == ""


positive = st.floats(1e-3, 1e6)


@given(st.lists(positive, min_size=1, max_size=8), st.booleans(), st.integers(2, 8))
@settings(max_examples=200, deadline=None)
def test_axes_hold_their_values_and_have_sensible_ticks(values: list[float], log: bool, wanted: int) -> None:
    axis = charts.axis(values, 10, 210, log=log)
    assert all(10 <= axis(v) <= 210 for v in values)
    ticks = axis.ticks(wanted)
    assert ticks == sorted(set(ticks)) and all(axis.low * 0.999 <= t <= axis.high * 1.001 for t in ticks)
    assert 1 <= len(ticks) <= 2 * wanted + 2
    places = [axis(t) for t in ticks]
    assert places == sorted(places)


def test_comparison_draws_bars_to_scale() -> None:
    svg = charts.comparison([("untuned", 0.25, 0.05, "before"), ("with <b>", 0.75, 0.02, "tuned")], 420)
    bars = [float(e.get("width", "")) for e in parse(svg).iter("rect")]
    assert bars[1] / bars[0] == pytest.approx(3, rel=0.01)
    assert "with &lt;b&gt;" in svg and "75.0 ± 2.0" in svg
    assert "nan" not in charts.comparison([("x", 0.5, math.nan, "before")], 420)


def test_interval_is_inside_its_scale() -> None:
    svg = charts.interval(0.9, 0.8, 0.99, (0.85, 0.95))
    numbers = [float(n) for n in re.findall(r'class="bar" d="M([\d.]+) 9H([\d.]+)"', svg)[0]]
    assert 0 <= numbers[0] < numbers[1] <= 150


def repeated() -> list[Trial]:
    """The examples, the best of them with three seeds."""
    done = trials()
    best = pareto.named(done)["most accurate"]
    return done + [surrogate.train(best.configuration, seed, where=TASK) for seed in (1, 2)]


def test_repeats_are_one_dot_and_say_so() -> None:
    done = repeated()
    best = pareto.named(done)["most accurate"]
    drawn = marks(charts.trade_offs(done, 820))
    assert len(drawn) == len(marks(charts.trade_offs(trials(), 820)))
    assert "3 seeds" in str(drawn[best.id].get("data-tip"))


@pytest.mark.parametrize("width", [820, 358])
def test_parallel_lines_pass_where_their_numbers_say(width: int) -> None:
    done = repeated()
    columns = parallel.columns(pareto.averaged(done), 10 if width > 500 else 5)
    names = [column.name for column in columns]
    assert names[0] == "method" and names[-3:] == ["score", "time", "memory"] and "learning_rate" in names
    assert len(names) <= (10 if width > 500 else 5)
    drawn = marks(parallel.chart(done, width))
    points = {t.id: p for t in pareto.averaged(done) if (p := pareto.objectives(t))}
    assert set(drawn) == set(points)
    heights = {i: float(str(next(iter(e.iter("path"))).get("d")).split("L")[-3].split()[1]) for i, e in drawn.items()}
    for a in points:
        for b in points:
            if points[a][0] < points[b][0]:
                assert heights[a] >= heights[b], "a higher score is drawn higher"
    front = {t.id for t in pareto.front(done)}
    assert {i for i, e in drawn.items() if "best" in str(e.get("class")).split()} == front
    for element in parse(parallel.chart(done, width)).iter("text"):
        assert 0 <= float(element.get("x", "")) <= width


def test_columns_of_one_kind_of_value() -> None:
    same = [replace(t, id=str(i)) for i, t in enumerate(trials()[:1] * 3)]
    assert [column.name for column in parallel.columns(same, 10)] == ["method", "score", "time", "memory"]
    assert all(0 <= place <= 1 for column in parallel.columns(same, 10) for place, _ in column.ticks)
    assert parallel.chart([], 820) == parallel.chart(trials()[:1], 820) == ""


def test_growth_steps_up_to_the_last_hypervolume() -> None:
    svg = parse(charts.growth([1.0, 2.0, 5.0], [0.1, 0.1, 0.4], 820))
    (line,) = (e for e in svg.iter("path") if e.get("class") == "grown")
    heights = [float(v) for v in re.findall(r"V([\d.]+)", str(line.get("d")))]
    assert heights == sorted(heights, reverse=True) and heights[-1] < heights[0]
    assert charts.growth([1.0], [0.1], 820) == charts.growth([1.0, 2.0], [0.0, 0.0], 820) == ""


def test_bars_are_as_long_as_their_shares() -> None:
    svg = parse(charts.shares([("rank of LoRA", 0.8, "m-lora", ""), ("method", 0.4, "", "LoRA")], 820))
    wide = [float(str(e.get("width"))) for e in svg.iter("rect")]
    assert wide[0] == pytest.approx(2 * wide[1], rel=0.01)
    assert charts.shares([], 820) == ""
