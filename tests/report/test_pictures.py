"""Pictures: what stands on their axes."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metapeft.report import pictures


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([12.8, 14.7, 16.9], ["13", "14", "15", "16", "17"]),
        ([3.0, 5.5, 9.5], ["3", "4", "5", "6", "8"]),
        ([1.5, 70.0], ["3", "10", "30"]),
    ],
)
def test_a_logarithmic_axis_names_its_ticks(values: list[float], expected: list[str]) -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.scatter(values, values)
    pictures._logarithmic(axes, axes.xaxis, lambda value: f"{value:g}", values)
    axes.set_xlim(min(values) / 1.03, max(values) * 1.03)
    figure.canvas.draw()
    low, high = axes.get_xlim()
    ticks = [*axes.xaxis.get_minor_ticks(), *axes.xaxis.get_major_ticks()]
    labels = {t.label1.get_text() for t in ticks if low <= t.get_loc() <= high} - {""}
    said = sorted(labels, key=float)
    assert [s for s in said if s in expected] == expected and len(said) <= len(expected) + 1, said


def test_a_title_is_no_formula() -> None:
    figure, _ = pictures._figure(1, "us$_vs_$ca")
    figure.canvas.draw()
