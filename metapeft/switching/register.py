"""What came of a sequence of tasks, in MLflow: its measures, and where every task has an adapter of its own, these as
trials and as versions in the registry.

One adapter that went on from task to task is no version: it asks as its last task does, and what it came to depends on
the tasks before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metapeft.data.task import Task
from metapeft.settings import Settings
from metapeft.switching.sequence import Learned
from metapeft.tracking.tracker import Tracker
from metapeft.training.trial import Trial


def register(tracker: Tracker, tasks: Sequence[Task], settings: Sequence[Settings], found: Learned) -> None:
    """Records it in the tracker's run, and fills `found.models`. settings: of each task, as if it were trained alone.
    Doing it again for the same adapters registers nothing new."""
    tracker.log_json(found.to_json(), "sequence.json")
    tracker.set_tags({"tasks": found.tasks, "keep": found.keep["kind"], "sequence": found.id})
    names = ("average_accuracy", "backward_transfer", "forgetting", "drift")
    tracker.log_metrics({f"sequence.{name}": getattr(found, name) for name in names})
    found.models = []
    if found.keep["kind"] != "adapters":
        return
    for task, own, record, folder in zip(tasks, settings, found.trials, found.adapters, strict=True):
        trial = Trial.from_json(record)
        alone = Tracker(tracker.client, own, tracker.log_trial(trial, task))
        alone.log_settings()
        registered = alone.register(Path(folder), trial, task).to_json()
        found.models.append(registered | {"run_id": alone.run_id, "run_url": alone.url()})
