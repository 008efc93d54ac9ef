"""What came of a few shots, in MLflow: the decision with its evidence, the outcome, and a version in the registry.

Where the task has no test split, the version's score is that of the held-out shots, as its metric says; it is then not
compared with versions that a test split has scored. The trials are not handed on as experience: what a configuration
came to from another task's adapter, or from a context, says little about the configuration.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from metapeft.data.task import Task
from metapeft.fewshot.adapt import Adapted
from metapeft.tracking.tracker import Tracker


def register(tracker: Tracker, task: Task, found: Adapted) -> Adapted:
    """Records it all in the tracker's run and registers the adapter, where one was left and something has measured it;
    the same with `registered`. Doing it again for the same adapter registers nothing new."""
    tracker.log_task(task)
    tracker.log_json(found.to_json(), "adapted.json")
    tracker.log_json(tracker.settings.model_dump(mode="json"), "settings.json")
    tracker.set_tags({"shots": found.shots, "strategy": found.chosen.strategy if found.chosen else "untuned"})
    run = {"run_id": tracker.run_id, "run_url": tracker.url()}
    if found.chosen is None or found.trial is None:
        return replace(found, registered=run)
    tracker.log_metrics({"adapt.gain": found.chosen.gain, "adapt.deviation": found.chosen.deviation})
    tracker.log_outcome(found.trial, experience=False)
    trial = found.trial
    if trial.score is None and trial.validation is not None:
        held_out = replace(trial.validation, metric=f"{trial.validation.metric} of held-out shots")
        trial = replace(trial, score=held_out)
    if trial.score is None:
        return replace(found, registered=run)
    return replace(found, registered=tracker.register(Path(found.adapter), trial, task).to_json() | run)
