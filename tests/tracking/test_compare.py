"""What `metapeft compare` shows of recorded runs."""

from __future__ import annotations

import pytest

from metapeft import tracking
from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.settings import Settings, load_settings
from metapeft.tracking.compare import compare
from tests.tracking.made import make_trial


def test_outcomes_side_by_side(settings: Settings, task: Task) -> None:
    trials = [make_trial(1, 0.8), make_trial(2, 0.9), make_trial(3, status="diverged", score=None)]
    with tracking.run(settings, "sweep") as sweep:
        ids = [sweep.log_trial(trial, task) for trial in trials]
    with tracking.run(settings, "train") as train:
        train.log_outcome(trials[1])
    with tracking.run(settings, "empty"):
        pass
    rows = compare(settings)
    assert [row["trial"] for row in rows] == [trials[1].id, trials[0].id, trials[2].id]
    assert rows[0]["score"] == 0.9 and rows[0]["score_standard_error"] == 0.02 and rows[0]["untuned_score"] == 0.5
    assert rows[0]["method"] == "lora" and rows[0]["status"] == "ok" and rows[0]["task"] == "sms_spam"
    assert rows[2]["score"] is None and rows[2]["status"] == "diverged"
    assert compare(settings, [sweep.run_id]) == compare(settings, ["sweep"]) == rows
    assert [row["run"] for row in compare(settings, [ids[0]])] == [ids[0]]
    assert len(compare(settings, [train.run_id, ids[2]])) == 2
    assert compare(settings, ["metapeft"]) == rows
    with pytest.raises(UserError, match="'nothing' is no run"):
        compare(settings, ["nothing"])


def test_a_run_that_was_killed_hides_no_outcome(settings: Settings, task: Task) -> None:
    trial = make_trial(1, 0.8)
    with tracking.run(settings, "sweep") as whole:
        done = whole.log_trial(trial, task)
    with tracking.run(settings, "sweep") as cut:
        started = whole.client.get_run(done).info
        for _ in range(6):  # as a kill leaves it: begun at the same moment, and no more known than which trial it was
            tags = {"mlflow.parentRunId": cut.run_id, "trial_id": trial.id}
            cut.client.create_run(started.experiment_id, started.start_time, tags, "cut")
    assert [(row["run"], row["score"]) for row in compare(settings)] == [(done, 0.8)]


def test_a_name_may_hold_an_apostrophe(settings: Settings, task: Task) -> None:
    with tracking.run(settings, "Ann's run") as run:
        run.log_trial(make_trial(1, 0.8), task)
    assert [row["score"] for row in compare(settings, ["Ann's run"])] == [0.8]


def test_an_empty_experiment_has_no_rows(settings: Settings) -> None:
    assert compare(settings) == []
    assert compare(load_settings(tracking={"experiment": "other"})) == []
