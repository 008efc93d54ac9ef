"""What came of a few shots, in MLflow: the decision with its evidence, the outcome, and a version in the registry.

Where the task has no test split, the version's score is that of the held-out shots, as its metric says; versions that
a test split has scored go before it. The trials are not handed on as experience: what a configuration
came to from another task's adapter, or from a context, says little about the configuration.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from metapeft.data.task import Task
from metapeft.fewshot.adapt import Adapted
from metapeft.tracking.models import HELD_OUT
from metapeft.tracking.tracker import Tracker


def register(tracker: Tracker, task: Task, found: Adapted) -> Adapted:
    """Records it all in the tracker's run and, where an adapter was left, in a run of its own beneath, whose adapter is
    registered where something has measured it; the same with `registered`. Doing it again for the same adapter
    registers nothing new."""
    tracker.log_task(task)
    tracker.log_json(found.to_json(), "adapted.json")
    tracker.set_tags({"strategy": found.chosen.strategy if found.chosen else "untuned"})
    if found.chosen is None or found.trial is None:
        return replace(found, registered={"run_id": tracker.run_id, "run_url": tracker.url()})
    own = replace(tracker, run_id=tracker.log_trial(found.trial, task, experience=False))
    own.log_settings()
    own.set_tags({"shots": found.shots, "strategy": found.chosen.strategy})
    own.log_metrics({"adapt.gain": found.chosen.gain, "adapt.deviation": found.chosen.deviation})
    run = {"run_id": own.run_id, "run_url": own.url()}
    trial = found.trial
    if trial.score is None and trial.validation is not None:
        trial = replace(trial, score=replace(trial.validation, metric=trial.validation.metric + HELD_OUT))
    if trial.score is None:
        return replace(found, registered=run)
    return replace(found, registered=own.register(Path(found.adapter), trial, task).to_json() | run)
