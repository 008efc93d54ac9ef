"""What all DAGs have in common."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from metapeft.airflow.notify import failed, late
from metapeft.airflow.pools import MLX


def task_defaults(**more: Any) -> dict[str, Any]:
    """`default_args`: owner, retries that wait longer each time, a message when all of them are used up.

    (Wrong input is not tried again: the operators raise AirflowFailException.)
    """
    return {
        "owner": "metapeft",
        "retries": 2,
        "retry_delay": timedelta(seconds=30),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=10),
        "execution_timeout": timedelta(hours=1),
        "on_failure_callback": failed,
        **more,
    }


def deadline(hours: float) -> DeadlineAlert:
    """A message when a run is not done so long after it was queued; it goes on."""
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT, interval=timedelta(hours=hours), callback=AsyncCallback(late)
    )


def on_mlx() -> dict[str, Any]:
    """Arguments of a task that trains or evaluates: a slot of the pool, and the queue of the workers made for it.

    METAPEFT_MLX_QUEUE names that queue where only some workers can run MLX (a Mac beside containers).
    """
    queue = os.environ.get("METAPEFT_MLX_QUEUE")
    return {"pool": MLX} | ({"queue": queue} if queue else {})


class Workflow(DAG):
    """A DAG whose `test` works. Airflow 3.3's own breaks at the end of a good run that has a deadline."""

    def test(self, *given: Any, **more: Any) -> Any:
        self.deadline = None
        return super().test(*given, **more)
