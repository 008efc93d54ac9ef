"""### Version datasets

Every night, and whenever somebody marks the asset `incoming` as updated (a button in the UI, or `POST
/api/v2/assets/events` at the end of an upload): each task file in the project's `data` folder is read, checked, put
under DVC (`FILE.dvc`, content in DVC's cache, pushed to its remote) and, where its content is new to DVC or to the
remote, the asset `datasets` is updated, with the file's name and versions as `extra`.

A broken file fails alone; the others go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import AssetOrTimeSchedule, CronTriggerTimetable, task
from airflow.sdk.exceptions import AirflowSkipException

from metapeft.airflow.assets import DATASETS, INCOMING
from metapeft.airflow.defaults import Workflow, deadline, task_defaults
from metapeft.airflow.operators import CommandOperator
from metapeft.airflow.pools import DVC

PROJECT = Path(__file__).resolve().parents[1]
KINDS = (".jsonl", ".csv", ".parquet")


class VersionOperator(CommandOperator):
    """One file under DVC. Updates the asset `datasets` where the content is new, else ends as skipped."""

    def execute(self, context: Mapping[str, Any]) -> Any:
        found = super().execute(context)
        if not found["changed"]:
            raise AirflowSkipException(f"{found['file']} is as it was: {found['dvc_id']}")
        if "outlet_events" in context:
            context["outlet_events"][DATASETS].extra = {key: found[key] for key in ("task", "version", "dvc_id")}
        return found


with Workflow(
    "version_datasets",
    description="Put changed task files under DVC, checked",
    doc_md=__doc__,
    schedule=AssetOrTimeSchedule(timetable=CronTriggerTimetable("0 1 * * *", timezone="UTC"), assets=[INCOMING]),
    catchup=False,
    tags=["metapeft", "data"],
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=6),
    deadline=deadline(hours=2),
    default_args=task_defaults(),
) as dag:

    @task
    def files() -> list[list[str]]:
        """The command of every task file, whose kind its name tells."""
        found = sorted(path for path in (PROJECT / "data").glob("*") if path.suffix in KINDS)
        return [["tasks", "version", str(path.relative_to(PROJECT))] for path in found]

    VersionOperator.partial(
        task_id="version",
        project=str(PROJECT),
        pool=DVC,
        outlets=[DATASETS],
        map_index_template="{{ task.arguments[2] }}",
    ).expand(arguments=files())
