"""### Grow the experience and retrain the meta-model

Every night, when a dataset has changed, and when the advice got worse (`monitor_selection`): `grow` runs, for as long
as the form says, the trials that teach most per second (it goes on where it stopped); `retrain` fits a new meta-model
to everything known and lets it compete with the champion on families of tasks left out of both; `promoted` updates the
asset `meta-model` if it won. The loser stays as challenger: `metapeft meta promote` can still choose it, `metapeft meta
rollback` undoes a promotion. `version` puts the experience and the meta-model under DVC (folder `knowledge`, pushed to
the remote) and the model into MLflow's registry.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import AssetAny, AssetOrTimeSchedule, CronTriggerTimetable, Param, task
from airflow.sdk.exceptions import AirflowSkipException

from metapeft.airflow.assets import DATASETS, DEGRADED, EXPERIENCE, META_MODEL
from metapeft.airflow.defaults import Workflow, deadline, on_mlx, task_defaults
from metapeft.airflow.operators import CommandOperator
from metapeft.airflow.pools import DVC

PROJECT = Path(__file__).resolve().parents[1]

with Workflow(
    "grow_and_retrain",
    description="Run the trials that teach most, then fit the meta-model again",
    doc_md=__doc__,
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable("0 2 * * *", timezone="UTC"), assets=AssetAny(DATASETS, DEGRADED)
    ),
    catchup=False,
    tags=["metapeft", "meta-model"],
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=12),
    deadline=deadline(hours=10),
    default_args=task_defaults(),
    params={
        "max_seconds": Param(
            4 * 3600,
            type="number",
            minimum=1,
            maximum=10 * 3600,
            title="Seconds of growth",
            description="How long trials are run before the meta-model is fitted again",
        ),
        "tasks": Param(
            None,
            type=["null", "array"],
            items={"type": "string", "minLength": 1},
            title="Tasks",
            description="Files or catalog names, on which trials are run; empty: the whole catalog",
        ),
        "backbone": Param(
            None, type=["null", "string"], title="Backbone", description="Whose experience grows; empty: the default"
        ),
    },
) as dag:
    grow = CommandOperator(
        task_id="grow",
        arguments=["experience", "grow"],
        form={"max_seconds": "--max-seconds", "tasks": "--tasks", "backbone": "--backbone"},
        project=str(PROJECT),
        execution_timeout=timedelta(hours=11),
        outlets=[EXPERIENCE],
        **on_mlx(),
    )
    retrain = CommandOperator(
        task_id="retrain", arguments=["meta", "train"], project=str(PROJECT), execution_timeout=timedelta(hours=2)
    )

    @task(outlets=[META_MODEL])
    def promoted(trained: dict[str, Any]) -> dict[str, Any]:
        """Succeeds, and so updates the asset, only where the new meta-model became champion."""
        if not trained["promoted"]:
            raise AirflowSkipException(f"the champion stays: {trained['reason']}")
        return trained

    version = CommandOperator(
        task_id="version",
        arguments=["experience", "version"],
        project=str(PROJECT),
        pool=DVC,
        trigger_rule="none_failed",
    )
    grow >> retrain
    promoted(retrain.output) >> version
