"""What the demo says of the methods that its sweep tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metapeft.demo import best_per_method
from metapeft.training.trial import Score
from tests.meta.made import trial


def tried(method: str, score: float, status: Any = "ok", **values: Any) -> Any:
    return replace(
        trial(score, method=method, status=status, **values), validation=Score("accuracy", score, 0.05, 60, 1.0)
    )


def test_every_method_that_was_tried_has_a_row_and_those_that_were_stopped_come_last() -> None:
    trials = [
        tried("p_tuning", 0.9, "stopped"),
        tried("lora", 0.5),
        tried("lora", 0.7, learning_rate=3e-4),
        tried("prefix", 0.8),
        replace(tried("adalora", 0.0, "diverged"), validation=None, score=None),
    ]
    rows = best_per_method(trials)
    assert [(row["method"], row["status"]) for row in rows] == [
        ("prefix", "ok"),
        ("lora", "ok"),
        ("p_tuning", "stopped"),
        ("adalora", "diverged"),
    ]
    assert rows[1]["validation"]["value"] == 0.7
