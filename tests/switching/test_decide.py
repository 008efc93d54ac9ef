"""Decisions: a function of their evidence, and the right way round."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.errors import UserError
from metapeft.switching.decide import LEAST, Evidence, Policy, decide, differing, recorded, replay, to_json

ROW = {"step": 10, "seconds": 3.0, "train_loss": 1.0, "validation_loss": 1.2, "validation_score": 0.5}


def evidence(*means: float, deviation: float = 0.03, in_hand: float = 0.1, **more: Any) -> Evidence:
    """The first mean is that of going on."""
    options = tuple(
        {"configuration": {"method": m}, "steps": 30, "cost": 1.0, "how": "frozen"}
        for m in ("lora", "prefix", "prompt")[: len(means)]
    )
    values: dict[str, Any] = {
        "leg": 0,
        "step": 20,
        "steps": 40,
        "seconds_left": 30.0,
        "curve": (ROW, {**ROW, "step": 20, "validation_loss": 1.0}),
        "untuned": 0.3,
        "in_hand": (in_hand, 0.05),
        "extrapolated": (means[0], 0.1),
        "options": options,
        "mean": means,
        "covariance": tuple(tuple(row) for row in (np.eye(len(means)) * deviation**2).tolist()),
    }
    return Evidence(**(values | more))


def test_what_is_clearly_better_is_taken() -> None:
    decision = decide(evidence(0.2, 0.8, 0.5), Policy())
    assert decision.to == 1 and decision.switch
    assert decision.expected[1].gain == pytest.approx((0.8 - 0.2) * 0.7, abs=0.02)  # of the room above the backbone
    assert decision.expected[1].confidence > 0.99


def test_what_is_not_is_left() -> None:
    assert decide(evidence(0.5, 0.2, 0.4), Policy()).to == 0
    assert decide(evidence(0.5), Policy()).to == 0  # nothing else fits into the seconds left


def test_doubt_is_weighed_against_the_stated_confidence() -> None:
    unsure = evidence(0.4, 0.5, deviation=0.2)
    confidence = decide(unsure, Policy()).expected[1].confidence
    assert 0.5 < confidence < 0.75
    assert decide(unsure, Policy(confidence=confidence + 0.01)).to == 0
    assert decide(unsure, Policy(confidence=confidence - 0.01)).to == 1


def test_an_alternative_that_fails_leaves_what_is_in_hand() -> None:
    """Its worst futures are worth what was reached before."""
    bad = decide(evidence(0.5, -0.9, in_hand=0.5), Policy()).expected[1]
    assert bad.score == pytest.approx(0.3 + 0.5 * 0.7, abs=0.03)
    assert bad.confidence == pytest.approx(0, abs=0.01)


def test_no_more_exchanges_than_allowed() -> None:
    assert decide(evidence(0.1, 0.9, switches=2), Policy(most=2)).to == 0
    assert decide(evidence(0.1, 0.9, switches=1), Policy(most=2)).to == 1


def test_a_gain_that_is_certain_and_tiny_is_not_worth_it() -> None:
    decision = decide(evidence(0.5, 0.505, deviation=1e-4), Policy())
    assert decision.expected[1].confidence > 0.99 and decision.expected[1].gain < LEAST
    assert decision.to == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=3),
    st.floats(0.01, 0.4),
    st.floats(0.5, 0.99),
    st.floats(-0.5, 1),
)
def test_a_record_replays_to_itself(means: list[float], deviation: float, confidence: float, in_hand: float) -> None:
    known = evidence(*means, deviation=deviation, in_hand=in_hand)
    policy = Policy(confidence=confidence)
    record = json.loads(json.dumps(to_json(known, policy, decide(known, policy))))
    assert replay(record) == recorded(record) == decide(known, policy)
    assert differing([record]) == []


def test_a_changed_record_is_found() -> None:
    record = json.loads(json.dumps(to_json(evidence(0.2, 0.8), Policy(), decide(evidence(0.2, 0.8), Policy()))))
    record["evidence"]["mean"][1] = 0.1
    assert differing([record]) == [0]
    with pytest.raises(UserError, match="no record of a decision"):
        replay({"evidence": {}})


def test_more_doubt_about_going_on_never_makes_it_surer() -> None:
    sure = decide(evidence(0.2, 0.8), Policy()).expected[1].confidence
    covariance = ((0.3**2, 0.0), (0.0, 0.03**2))
    unsure = decide(replace(evidence(0.2, 0.8), covariance=covariance), Policy()).expected[1].confidence
    assert unsure <= sure


def test_signals_are_what_is_followed() -> None:
    signals = evidence(0.2, 0.8).signals()
    assert signals["slope"] == pytest.approx(-0.2)  # per doubling of the steps
    assert set(signals) == {"score", "validation_loss", "train_loss", "slope", "gradient_noise", "seconds_left"}
