"""Whether to exchange the method in hand: a pure function of its evidence, so that every decision can be replayed.

Evidence is what was known at an evaluation: the curve, the forecasts of going on and of every alternative (jointly,
with the steps that the seconds left would buy each of them after the exchange is paid for), and the score in hand.
From it the same 4,000 futures are drawn each time. Going on ends at the curve's end. An alternative ends where its own
training would, or at what is in hand now, whichever is better: the old adapter is kept and comes back if the new one
loses. That is the value of an exchange; it is made where that value exceeds the other with at least the stated
confidence and is worth LEAST on average.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from metapeft.errors import UserError
from metapeft.meta import gains

DRAWS = 4000
LEVEL = 0.9  # of the intervals
LEAST = 0.01  # of the score, on average: less is not worth the trouble


@dataclass(frozen=True)
class Policy:
    """confidence: that an exchange is better, before it is made. most: exchanges in one training. tolerance: how much
    score an exchange may cost at its moment, or at the end, before it is undone. looks: evaluations; after an
    exchange those that are left, but two at least."""

    confidence: float = 0.62
    most: int = 2
    tolerance: float = 0.02
    looks: int = 4  # as many as a static training has: without an exchange it is the very same


@dataclass(frozen=True)
class Evidence:
    """Known at one evaluation. All JSON.

    curve: rows of this leg so far. steps: of this leg. seconds_left: of the budget, in predicted seconds. in_hand: gain
    of the best weights so far and its standard error. extrapolated: mean and deviation of the gain by the curve alone.
    options: the configuration in hand first; each with its `configuration`, `steps` (in all for the first, after the
    exchange for the others), `cost` (seconds of the exchange) and `how` what was learned is kept. mean, covariance: of
    their final gains. untuned: the backbone's score. switches: made before.
    """

    leg: int
    step: int
    steps: int
    seconds_left: float
    curve: tuple[dict[str, Any], ...]
    untuned: float
    in_hand: tuple[float, float]
    extrapolated: tuple[float, float]
    options: tuple[dict[str, Any], ...]
    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    switches: int = 0

    def signals(self) -> dict[str, float | None]:
        """What is followed, for people: score, losses, slope of the loss per doubling of steps, gradient noise."""
        last = self.curve[-1]
        slope = None
        if len(self.curve) > 1:  # a leg that failed before its first look has one row, without a loss
            before = self.curve[-2]
            slope = (last["validation_loss"] - before["validation_loss"]) / np.log2(last["step"] / before["step"])
        return {
            "score": last["validation_score"],
            "validation_loss": last["validation_loss"],
            "train_loss": last["train_loss"],
            "slope": None if slope is None else float(slope),
            "gradient_noise": last.get("gradient_noise"),
            "seconds_left": self.seconds_left,
        }


@dataclass(frozen=True)
class Expected:
    """What an option will come to: the mean test score and its 90 % interval; and against going on: the score it is
    expected to gain, and the chance that it gains any."""

    score: float
    low: float
    high: float
    gain: float = 0.0
    confidence: float = 0.0


@dataclass(frozen=True)
class Decision:
    """`to`: index of the option that is taken; 0 is going on."""

    to: int
    why: str
    expected: tuple[Expected, ...] = field(default_factory=tuple)

    @property
    def switch(self) -> bool:
        return self.to > 0


def decide(evidence: Evidence, policy: Policy) -> Decision:
    """The same evidence and policy always give the same decision."""
    expected = _expected(evidence)
    if evidence.switches >= policy.most:
        return Decision(0, f"{policy.most} exchanges were made, which is the most", expected)
    if len(expected) == 1:
        return Decision(0, "too few seconds are left for anything else", expected)
    worth = [i for i in range(1, len(expected)) if expected[i].confidence >= policy.confidence]
    worth = [i for i in worth if expected[i].gain >= LEAST]
    best = max(worth or range(1, len(expected)), key=lambda i: (expected[i].gain, -i))
    said = (
        f"{evidence.options[best]['configuration']['method']} is expected to gain {expected[best].gain:+.3f} over going"
        f" on, with confidence {expected[best].confidence:.2f}"
    )
    if worth:
        return Decision(best, said, expected)
    return Decision(0, f"{said}; asked for are {LEAST} and {policy.confidence:g}", expected)


def _expected(evidence: Evidence) -> tuple[Expected, ...]:
    random = np.random.default_rng(0)
    mean, covariance = np.array(evidence.mean), np.array(evidence.covariance)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    root = vectors * np.sqrt(np.maximum(values, 0))
    futures = mean + random.standard_normal((DRAWS, len(mean))) @ root.T
    now, error = evidence.in_hand
    # What is in hand is no better than where going on ends, whose best weights are kept too.
    kept = np.minimum(now + error * random.standard_normal(DRAWS), futures[:, 0])
    futures[:, 1:] = np.maximum(futures[:, 1:], kept[:, None])
    scores = gains.score(futures, evidence.untuned)
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    more = scores - scores[:, :1]
    confidence = (more > 0).mean(axis=0)
    return tuple(
        Expected(*(round(float(v), 6) for v in row))
        for row in zip(scores.mean(axis=0), low, high, more.mean(axis=0), confidence, strict=True)
    )


def to_json(evidence: Evidence, policy: Policy, decision: Decision) -> dict[str, Any]:
    """The record of a decision: what was known, what was asked for, what was decided."""
    record = {"evidence": asdict(evidence), "policy": asdict(policy), "decision": asdict(decision)}
    found: dict[str, Any] = json.loads(json.dumps(record | {"signals": evidence.signals()}))  # as a file gives it back
    return found


def replay(record: Mapping[str, Any]) -> Decision:
    """The decision that a record's evidence leads to; equal to the recorded one (`recorded`) unless either was changed.

    Raises UserError for what is no record of a decision.
    """
    try:
        given = dict(record["evidence"])
        for name in ("curve", "options", "mean", "in_hand", "extrapolated"):
            given[name] = tuple(given[name])
        given["covariance"] = tuple(tuple(row) for row in given["covariance"])
        return decide(Evidence(**given), Policy(**record["policy"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"this is no record of a decision ({error}); give one of the `decisions` in switching.json"
        ) from error


def recorded(record: Mapping[str, Any]) -> Decision:
    """The decision as it was written down."""
    found = record["decision"]
    return Decision(found["to"], found["why"], tuple(Expected(**e) for e in found["expected"]))


def differing(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which of a training's decisions come out otherwise when they are replayed: none, if all is well."""
    return [number for number, record in enumerate(records) if replay(record) != recorded(record)]
