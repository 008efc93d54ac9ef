"""The one MLflow run of a pipeline: continued by its stages, and left alone once it came to something else."""

from __future__ import annotations

from pathlib import Path

from metapeft.data.task import Task
from metapeft.settings import Settings
from metapeft.stages.tracked import pipeline_run
from metapeft.training.trial import Trial
from tests.tracking.conftest import no_database, settings, task  # noqa: F401
from tests.tracking.made import make_trial


def test_another_outcome_is_another_run(settings: Settings, task: Task, tmp_path: Path) -> None:  # noqa: F811
    """Train, sweep, train again: the second training takes the sweep's best, which is another trial."""
    first, better = make_trial(1, 0.7), make_trial(2, 0.9, configuration={"learning_rate": 0.01})

    def register(trial: Trial) -> str:
        with pipeline_run(settings, tmp_path, task, trial.id) as tracker:
            tracker.log_outcome(trial)
        return tracker.run_id

    one = register(first)
    assert register(first) == one, "the same again is the same run"
    with pipeline_run(settings, tmp_path, task) as sweep:
        sweep.log_trial(better, task)
    assert sweep.run_id != one
    two = register(better)
    assert two == sweep.run_id, "the sweep's run comes to what was found"
    assert register(first) not in (one, two)
