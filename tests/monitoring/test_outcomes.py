"""Every recommendation with what came of it: each trial once, and only like with like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metapeft.meta import scores
from metapeft.monitoring.outcomes import Kind, binned, disorder, ece, joined
from metapeft.training.trial import Score, Trial
from tests.meta.made import BACKBONE, task, trial

RATES = (1e-4, 1e-3, 3e-3, 1e-2)


def entry(id: str, day: int, means: tuple[float, ...] = (0.8, 0.7, 0.6, 0.5), **more: Any) -> dict[str, Any]:
    """A recommendation of four learning rates, the first one best."""
    return {
        "id": id,
        "at": f"2026-02-{day:02d}T00:00:00.000000+00:00",
        "task": "spam",
        "task_version": task().version,
        "backbone": BACKBONE,
        "model": 1,
        "neighbours": [{"task": "sms_spam", "similarity": 0.5, "best": {}}],
        "recommendations": [
            {
                "rank": rank,
                "configuration": {"method": "lora", "learning_rate": rate},
                "score": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "level": 0.9},
                "p_within_1pct": 0.5 if rank == 1 else 0.2,
                "seconds": 30.0,
            }
            for rank, (rate, mean) in enumerate(zip(RATES, means, strict=True), 1)
        ],
        **more,
    }


def run(score: float | None, rate: float, day: int, **more: Any) -> Trial:
    return trial(score, learning_rate=rate, started=f"2026-02-{day:02d}T12:00:00+00:00", **more)


def test_a_trial_counts_for_the_last_recommendation_before_it() -> None:
    trials = [run(0.9, RATES[0], 1), run(0.7, RATES[0], 3, seed=1), run(0.85, RATES[1], 3), run(0.5, 0.5, 3)]
    first, second = joined([entry("b", 2), entry("a", 1)], trials)
    assert (first.id, first.followed) == ("a", (trials[0].id,))
    assert set(second.followed) == {trials[1].id, trials[2].id}, "what was not recommended is nobody's"
    assert first.regret is None and first.kind == Kind(1)
    assert second.regret == pytest.approx(0.15) and second.kind.tried == 2 and second.kind.near
    assert second.like == "spam (like sms_spam)"


def test_only_one_budget_and_split_is_compared_and_intervals_only_at_what_was_predicted() -> None:
    held = Score("accuracy", 0.6, 0.04, 100, 0.5)
    trials = [
        run(0.8, RATES[0], 2, budget=120),
        run(0.95, RATES[1], 2, budget=40),
        run(None, RATES[0], 2, budget=40, validation=held),
        run(None, RATES[2], 2, budget=40, validation=Score("accuracy", 0.7, 0.04, 100, 0.5)),
    ]
    (decision,) = joined([entry("a", 1, steps=120)], trials)
    assert decision.regret == pytest.approx(0.1), "three validation scores at 40 steps, of which two are comparable"
    assert decision.kind.examples == 100 and decision.kind.tried == 2
    assert decision.outside == 0.0, "one score at 120 steps, inside"


def test_what_failed_or_came_before_says_nothing() -> None:
    (decision,) = joined([entry("a", 5)], [run(0.9, RATES[0], 4), run(0.1, RATES[0], 6, status="failed")])
    assert decision.regret is None and decision.outside is None and decision.kind == Kind(0)


def test_how_often_a_training_looks_at_itself_is_no_other_configuration() -> None:
    short = run(0.7, RATES[1], 2)
    short.configuration = short.configuration | {"evaluations": 2}
    (decision,) = joined([entry("a", 1)], [run(0.8, RATES[0], 2), short])
    assert decision.kind.tried == 2 and decision.regret == 0


def test_what_diverged_leaves_the_untuned_backbone() -> None:
    untuned = Score("accuracy", 0.2, 0.02, 300, 1.0)
    lost = run(None, RATES[0], 2, status="diverged", untuned_score=untuned)
    (decision,) = joined([entry("a", 1)], [lost, run(0.7, RATES[1], 2)])
    assert decision.regret == pytest.approx(0.5) and decision.kind.tried == 2
    assert decision.outside == pytest.approx(0.5), "the one that diverged is far below its interval"
    swept = run(None, RATES[1], 2, validation=Score("accuracy", 0.7, 0.02, 64, 1.0))
    (decision,) = joined([entry("a", 1)], [lost, swept])
    assert decision.regret == pytest.approx(0.5), "also beside what was scored on validation rows alone"


def test_seconds_are_compared_at_the_predicted_budget() -> None:
    (decision,) = joined([entry("a", 1, steps=120)], [run(0.8, RATES[0], 2, seconds=60.0)])
    assert decision.slowness == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12))
def test_disorder_of_the_reversed_prediction_is_the_rest(pairs: list[tuple[float, float]]) -> None:
    predicted, measured = np.array(pairs).T
    found, other = disorder(predicted, measured), disorder(-predicted, measured)
    if found is not None and other is not None:
        assert 0 <= found <= 1 and found + other == pytest.approx(1)
        assert disorder(measured, measured) == 0.0
    assert disorder(predicted[:2], measured[:2]) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_ece_is_that_of_the_evaluation(pairs: list[tuple[float, bool]]) -> None:
    chances, happened = (np.array(v, dtype=float) for v in zip(*pairs, strict=True))
    assert float(ece(binned(zip(chances, happened, strict=True)))) == pytest.approx(scores.ece(chances, happened))
