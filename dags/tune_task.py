"""### Tune a task

Takes one labelled text task to a registered adapter: **version → validate → profile → recommend → sweep → train →
evaluate → register → report**. Trigger it by hand: *Trigger DAG w/ config* shows the form.

Every stage runs in a fresh process and writes into the folder of this run, `METAPEFT_HOME/airflow/tune_task/RUN_ID`.
A cleared task whose inputs have not changed ends at once with the same result. Wrong input fails at once; anything else
is tried again. The outcome is in MLflow, the adapter in its registry.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from airflow.sdk import DAG, Param

from metapeft.airflow.operators import StageOperator
from metapeft.settings import load_settings

PROJECT = Path(__file__).resolve().parents[1]
defaults = load_settings(PROJECT / "params.yaml")

FORM = {  # parameter -> the setting it sets
    "task": "task",
    "backbone": "backbone",
    "prefer": "recommend.prefer",
    "max_seconds": "recommend.max_seconds",
    "max_memory_mb": "recommend.max_memory_mb",
    "trials": "sweep.trials",
    "trial_steps": "sweep.steps",
    "steps": "train.steps",
    "seed": "seed",
}
HOURS = {"sweep": 12, "train": 6}  # the longest a stage may take, where it is not one hour

with DAG(
    "tune_task",
    description="Recommend, tune, train and register an adapter for one task",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    tags=["metapeft", "tuning"],
    max_active_runs=4,
    dagrun_timeout=timedelta(hours=24),
    default_args={
        "owner": "metapeft",
        "retries": 2,
        "retry_delay": timedelta(seconds=30),
        "retry_exponential_backoff": True,
    },
    params={
        "task": Param(
            defaults.task,
            type="string",
            minLength=1,
            title="Task",
            description="A file (.jsonl, .csv, .parquet), a Hugging Face dataset id, or a catalog name",
        ),
        "backbone": Param(
            defaults.backbone,
            type="string",
            minLength=1,
            title="Backbone",
            description="The packaged model, an mlx-lm hub id, or a local folder",
        ),
        "prefer": Param(
            defaults.recommend.prefer,
            type="string",
            enum=["accuracy", "balanced", "speed", "memory"],
            title="Prefer",
            description="What the recommendation weighs most",
        ),
        "max_seconds": Param(
            defaults.recommend.max_seconds,
            type=["null", "number"],
            exclusiveMinimum=0,
            title="Seconds at most",
            description="Longest training that may be recommended",
        ),
        "max_memory_mb": Param(
            defaults.recommend.max_memory_mb,
            type=["null", "number"],
            exclusiveMinimum=0,
            title="Memory at most (MB)",
            description="Highest peak memory that may be recommended",
        ),
        "trials": Param(
            defaults.sweep.trials,
            type="integer",
            minimum=1,
            maximum=1000,
            title="Trials",
            description="Trials of the sweep",
        ),
        "trial_steps": Param(
            defaults.sweep.steps,
            type="integer",
            minimum=1,
            title="Steps per trial",
            description="Optimizer steps of one trial",
        ),
        "steps": Param(
            defaults.train.steps,
            type="integer",
            minimum=1,
            title="Steps",
            description="Optimizer steps of the final training",
        ),
        "seed": Param(
            defaults.seed, type="integer", minimum=0, title="Seed", description="Of data order and initialisation"
        ),
    },
) as dag:
    stages = [
        StageOperator(
            task_id=name,
            stage=name,
            work="{{ dag.dag_id }}/{{ run_id }}",
            form=FORM,
            project=str(PROJECT),
            execution_timeout=timedelta(hours=HOURS.get(name, 1)),
        )
        for name in ("version", "validate", "profile", "recommend", "sweep", "train", "evaluate", "register", "report")
    ]
    for before, after in pairwise(stages):
        before >> after
