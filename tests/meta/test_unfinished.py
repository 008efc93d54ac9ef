"""What curves that broke off leave open is learned from those that did not."""

from __future__ import annotations

import pytest

from metapeft.meta.unfinished import BELIEVED, Remaining, learn
from metapeft.training.trial import Trial
from tests.meta.made import trial


def finished(*scores: float) -> Trial:
    curve = [{"step": 30 * (i + 1), "validation_score": value} for i, value in enumerate(scores)]
    return trial(scores[-1], curve=curve)


def test_nothing_known_is_believed_and_the_end_is_the_end() -> None:
    assert learn([]) == Remaining() and Remaining().at(0.5) == BELIEVED[1]
    assert Remaining().at(1.0) == (0.0, 0.0) and Remaining().at(0.0) == BELIEVED[0]


def test_it_becomes_what_curves_show() -> None:
    slow = learn([finished(0.5, 0.6, 0.7, 0.9)] * 100)  # untuned 0.5: gains 0, 0.2, 0.4, 0.8
    assert [mean for mean, _ in slow.points] == pytest.approx([0.8, 0.6, 0.4], abs=0.1)
    assert slow.points[0][1] < BELIEVED[0][1] + 0.05
    quick = learn([finished(0.9, 0.9, 0.9, 0.9)] * 100)
    assert [mean for mean, _ in quick.points] == pytest.approx([0, 0, 0], abs=0.02)
    assert Remaining.from_json(quick.to_json()) == quick


def test_curves_without_middle_or_end_say_nothing() -> None:
    assert learn([trial(0.9, curve=[{"step": 120, "validation_score": 0.9}]), finished(0.5, 0.6)]) == Remaining()
