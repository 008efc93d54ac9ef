"""One MLflow run for one pipeline, though its stages are separate processes and some of them may be skipped.

The run's id lies in the work folder beside the stages' records: no stage's input, no DVC output, so it never makes
anything stale. It counts for one set of settings, one version of the data and one outcome; with other ones a new run
begins, which then also gets what the skipped stages had left in the work folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metapeft import tracking
from metapeft.data.task import Task
from metapeft.settings import Settings
from metapeft.stages.stage import write_json
from metapeft.tracking.client import connect, uri
from metapeft.tracking.tracker import Tracker


@contextmanager
def pipeline_run(settings: Settings, work: Path, task: Task, trial: str = "") -> Iterator[Tracker]:
    """The pipeline's run, begun or continued. Raises UserError when the tracking store cannot be used.

    trial: the id of what it comes to, where that is known. A run that came to something else is left as it is.
    """
    record = work / ".stages" / "mlflow.json"
    identity = [settings.model_dump(mode="json"), task.version, uri(settings.tracking)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    with tracking.run(settings, task.name, {"pipeline": key[:16]}, _known(settings, record, key, trial)) as tracker:
        write_json(record, {"key": key, "run_id": tracker.run_id})
        yield tracker


def _known(settings: Settings, record: Path, key: str, trial: str) -> str | None:
    """The run that the record names, if it is this pipeline's and still there."""
    from mlflow.exceptions import MlflowException

    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        run = connect(settings.tracking).get_run(found["run_id"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MlflowException):
        return None
    if run.info.lifecycle_stage != "active" or run.data.tags.get("trial_id", trial) != trial:
        return None
    return str(found["run_id"])
