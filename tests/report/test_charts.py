from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.report import charts
from metapeft.search import pareto
from tests.report.examples import trials


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
