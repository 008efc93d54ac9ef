"""What was recommended is written down once, and joined with the trials that came after."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from metapeft.meta import Experience, Recommendation, decisions, recommend
from metapeft.monitoring.outcomes import joined
from metapeft.settings import load_settings
from metapeft.training.trial import Score
from tests.meta.made import SPEED, profile, task, trial


def given(tmp_path: Path) -> Recommendation:
    return recommend(task(), profile(), load_settings(), Experience(tmp_path, shipped=None), SPEED)


def later() -> str:
    return (datetime.now(UTC) + timedelta(seconds=5)).isoformat(timespec="seconds")


def test_the_same_advice_counts_once(tmp_path: Path) -> None:
    found = given(tmp_path)
    assert decisions.record(found) == decisions.record(given(tmp_path)) == found.id
    (entry,) = decisions.read()
    assert entry["id"] == found.id and Recommendation.from_json({k: v for k, v in entry.items() if k != "at"}) == found


def test_outcomes_are_the_trials_that_came_after(tmp_path: Path) -> None:
    found = given(tmp_path)
    decisions.record(found)
    (none,) = decisions.outcomes([trial(0.9)])  # of long before
    assert none.followed == {} and none.regret is None and none.inside_90 is None
    first, second = (r.configuration for r in found.recommendations[:2])
    done = [trial(0.8, **first, started=later()), trial(0.85, **second, started=later()), trial(0.9, "other")]
    (outcome,) = decisions.outcomes(done)
    assert list(outcome.followed.values()) == [1, 2] and outcome.best == 0.85
    assert outcome.regret == pytest.approx(0.05) and outcome.inside_90 == 1.0
    low = found.recommendations[0].score.low
    (wrong,) = decisions.outcomes([trial(low - 0.05, **first, started=later())])
    assert wrong.inside_90 == 0.0 and wrong.regret == 0


def test_a_training_of_other_steps_says_nothing_about_what_was_predicted(tmp_path: Path) -> None:
    found = given(tmp_path)
    decisions.record(found)
    first = found.recommendations[0].configuration
    short = trial(0.1, **first, budget=5, started=later())
    (outcome,) = decisions.outcomes([trial(0.9, **first, budget=found.steps, started=later()), short])
    assert len(outcome.followed) == 1 and (outcome.best, outcome.regret) == (0.9, 0)


def test_a_torn_line_costs_only_itself(tmp_path: Path, home: Path) -> None:
    found = given(tmp_path)
    decisions.record(found)
    path = home / "decisions.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "half')
    decisions.record(found)
    assert [entry["id"] for entry in decisions.read()] == [found.id]
    assert path.read_bytes().count(found.id.encode()) == 2


def test_scores_by_another_metric_say_nothing_about_what_was_predicted(tmp_path: Path) -> None:
    found = given(tmp_path)
    decisions.record(found)
    first = trial(0.8, **found.recommendations[0].configuration, started=later())
    other = replace(first, id="f1", score=Score("macro_f1", 0.1, 0.02, 300, 1.0))
    (outcome,) = decisions.outcomes([first, other])
    assert list(outcome.followed) == [first.id] and (outcome.best, outcome.regret) == (0.8, 0)
    (decision,) = joined(decisions.read(), [first, other])
    assert decision.followed == (first.id,)


def test_a_short_trial_of_a_recommended_configuration_follows_it(tmp_path: Path) -> None:
    found = given(tmp_path)
    decisions.record(found)
    (outcome,) = decisions.outcomes(
        [trial(0.8, **found.recommendations[0].configuration, evaluations=2, started=later())]
    )
    assert list(outcome.followed.values()) == [1]
