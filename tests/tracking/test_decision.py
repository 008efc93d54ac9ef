"""A decision's record: whether the advice was followed, and whether what it promised came true."""

from __future__ import annotations

from typing import Any

import pytest

from metapeft.tracking.decision import advised, joined
from metapeft.training.trial import Trial
from tests.tracking.made import make_trial

PROFILE = {"embedding": [0.25, -1.0], "features": {"examples": 12.0}}


def entry(place: int, method: str, low: float, high: float, **configuration: Any) -> dict[str, Any]:
    score = {"mean": (low + high) / 2, "low": low, "high": high, "level": 0.9}
    likely = score | {"low": low + 0.05, "high": high - 0.05, "level": 0.8}
    return {"rank": place, "method": method, "configuration": configuration, "score": score, "likely": likely}


def advice(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"id": "abc", "basis": "experience", "model": 3, "recommendations": list(entries)}


TRIAL = make_trial(1, 0.9)  # lora, learning rate 1e-3, rank 8
OTHER = entry(1, "prefix", 0.8, 0.9, tokens=8)


@pytest.mark.parametrize(
    ("low", "high", "inside_80", "inside_90"),
    [(0.7, 1.0, True, True), (0.7, 0.92, False, True), (0.5, 0.8, False, False), (0.9, 1.0, False, True)],
)
def test_a_followed_advice_is_judged(low: float, high: float, inside_80: bool, inside_90: bool) -> None:
    record = joined(advice(OTHER, entry(2, "lora", low, high, rank=8)), PROFILE, TRIAL)
    assert record["chosen"]["rank"] == 2 and record["embedding"] == [0.25, -1.0] and record["meta_model"] == 3
    assert record["error"] == pytest.approx(0.9 - (low + high) / 2)
    assert (record["inside_80"], record["inside_90"]) == (inside_80, inside_90)
    assert record["outcome"]["score"] == 0.9 and record["outcome"]["untuned"] == 0.5


def test_another_configuration_of_an_advised_method_is_not_judged() -> None:
    given = advice(OTHER, entry(2, "lora", 0.1, 0.2, rank=64))
    found, exact = advised(given, TRIAL)
    assert found == given["recommendations"][1] and not exact
    record = joined(given, PROFILE, TRIAL)
    assert record["chosen"]["rank"] is record["error"] is record["inside_90"] is None


@pytest.mark.parametrize("trial", [TRIAL, make_trial(1, status="diverged", score=None, untuned_score=None)])
def test_nothing_is_judged_without_a_prediction_or_a_score(trial: Trial) -> None:
    given = advice(OTHER) if trial.score else advice(entry(1, "lora", 0.1, 0.2, rank=8))
    record = joined(given, PROFILE, trial)
    assert record["error"] is record["inside_80"] is record["inside_90"] is None
