"""### Watch the advice

Every six hours `metapeft monitor` compares what was recommended with what then happened, incoming tasks with those that
the meta-model learned from, servers and served adapters with what they promise. Alerts go where the worker's variables
METAPEFT_ALERT_URL, METAPEFT_ALERT_EMAIL and METAPEFT_ALERTMANAGER_URL say, each once.

A new alert that another meta-model may mend updates the asset `degraded`, with what it said as `extra`; that starts
`grow_and_retrain`. One task's profile is measured again in each run (`monitor.remeasure` in params.yaml). *Shadow
trials* trains the runner-up beside so many first choices per run, to know what was missed.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import CronTriggerTimetable, Param, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from metapeft.airflow.assets import DEGRADED
from metapeft.airflow.defaults import Workflow, deadline, on_mlx, task_defaults
from metapeft.airflow.notify import degraded as tell
from metapeft.airflow.operators import CommandOperator

PROJECT = Path(__file__).resolve().parents[1]

with Workflow(
    "monitor_selection",
    description="Compare what was recommended with what happened; raise alerts",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("30 */6 * * *", timezone="UTC"),
    catchup=False,
    tags=["metapeft", "meta-model", "monitoring"],
    max_active_runs=1,
    is_paused_upon_creation=False,  # nobody misses a watch that was never switched on
    dagrun_timeout=timedelta(hours=5),
    deadline=deadline(hours=4),
    default_args=task_defaults(),
    params={
        "shadow": Param(
            None,
            type=["null", "integer"],
            minimum=0,
            maximum=50,
            title="Shadow trials",
            description="Runner-ups that are trained beside first choices; empty: as params.yaml says (monitor.shadow)",
        ),
    },
) as dag:
    monitor = CommandOperator(
        task_id="monitor",
        arguments=["monitor", "--retrains", "{{ run_id }}"],  # a retry is told the same
        form={"shadow": "--shadow"},
        project=str(PROJECT),
        execution_timeout=timedelta(hours=4),
        **on_mlx(),
    )

    @task(outlets=[DEGRADED], on_success_callback=tell)
    def degraded(report: dict[str, Any]) -> dict[str, Any]:
        """Succeeds, and so updates the asset, only where retraining may mend what no earlier run has begun to."""
        if not report["retrain"]:
            old = len(report["alerts"])
            raise AirflowSkipException(f"nothing new to retrain for; {old} alerts in all" if old else "no alert")
        due = [alert for alert in report["alerts"] if alert["key"] in report["due"]]
        events = get_current_context().get("outlet_events")
        if events is not None:
            events[DEGRADED].extra = {"alerts": [alert["key"] for alert in due], "since": due[0]["since"]}
        return {"alerts": due}

    degraded(monitor.output)
