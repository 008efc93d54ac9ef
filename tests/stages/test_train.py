"""What the final training takes over from a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from metapeft.data.task import Task
from metapeft.settings import Settings
from metapeft.stages.files import write_task, write_trials
from metapeft.stages.stage import write_json
from metapeft.stages.train import choose
from metapeft.training.configuration import full, looks
from metapeft.training.trial import Score, Trial

SWEPT = full({"method": "prefix", "tokens": 12})


@pytest.mark.parametrize(
    ("steps", "evaluations", "taken"),
    [(20, 2, None), (20, 3, 3), (10, 1, None), (40, 4, None)],
)
def test_how_often_a_short_trial_looks_is_not_taken_over(
    tmp_path: Path, steps: int, evaluations: int, taken: int | None
) -> None:
    settings = Settings(backbone="some/backbone", recommend={"prefer": "accuracy"})  # type: ignore[arg-type]
    write_task(Task("t", "0" * 16, "generation", "exact_match", (), (), ()), tmp_path / "version")
    trial = Trial("a", "t", "v", "b", "prefix", SWEPT | {"evaluations": evaluations}, 0, steps, "ok")
    trial.validation = Score("exact_match", 0.5, 0.01, 10, 1.0)
    write_trials([trial], tmp_path / "sweep/trials.jsonl")
    record = {"task_version": "0" * 16, "backbone": "some/backbone", "infeasible": {}, "points": {}, "adapters": False}
    write_json(tmp_path / "sweep/sweep.json", record)
    chosen, why = choose(settings, tmp_path)
    assert why == "most accurate of 1 trials"
    assert chosen.get("evaluations") == taken
    assert full(chosen) == SWEPT | {"evaluations": taken or 4}


def test_trials_of_the_usual_length_look_as_often_as_a_training() -> None:
    assert [looks(steps) for steps in (1, 10, 20, 39, 40, 400)] == [1, 1, 2, 3, 4, 4]
