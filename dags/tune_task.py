"""### Tune a task

Takes one labelled text task to a registered adapter: **version → validate → profile → recommend → sweep → train →
evaluate → register → report**. Trigger it by hand: *Trigger DAG w/ config* shows the form.

Every stage runs in a fresh process and writes into the folder of this run, `METAPEFT_HOME/airflow/tune_task/RUN_ID`.
A cleared task whose inputs have not changed ends at once with the same result. Wrong input fails at once; anything else
is tried again.

The sweep is fanned out: `sweep_plan` says how many workers are worth starting, each `sweep_worker` trains trials of
the one study until it is complete, and `sweep` gathers them, or finishes what a killed worker left. Each takes a slot
of the pool `mlx`, as every training does: more slots, more at the same time.

The outcome is in MLflow, the adapter in its registry: it is served (alias `champion`) if it scores no worse than the
one before (the first: not clearly worse than the untuned backbone). The run updates the asset `experience`.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Param, chain

from metapeft.airflow.assets import EXPERIENCE
from metapeft.airflow.defaults import Workflow, deadline, on_mlx, task_defaults
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

with Workflow(
    "tune_task",
    description="Recommend, tune, train and register an adapter for one task",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    tags=["metapeft", "tuning"],
    max_active_runs=4,
    dagrun_timeout=timedelta(hours=24),
    deadline=deadline(hours=12),
    default_args=task_defaults(),
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
            description="Longest training that may be recommended; empty: no limit",
        ),
        "max_memory_mb": Param(
            defaults.recommend.max_memory_mb,
            type=["null", "number"],
            exclusiveMinimum=0,
            title="Memory at most (MB)",
            description="Highest peak memory that may be recommended; empty: no limit",
        ),
        "trials": Param(
            defaults.sweep.trials,
            type="integer",
            minimum=1,
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
        "workers": Param(
            defaults.sweep.workers,
            type="integer",
            minimum=1,
            title="Workers",
            description="Processes that share the trials; the pool mlx says how many run at the same time",
        ),
        "steps": Param(
            defaults.train.steps,
            type="integer",
            minimum=1,
            title="Steps",
            description="Optimizer steps of the final training",
        ),
        "seed": Param(
            defaults.seed,
            type="integer",
            minimum=0,
            maximum=2**31 - 1,
            title="Seed",
            description="Of data order and initialisation",
        ),
    },
) as dag:
    common = {"form": FORM, "project": str(PROJECT), "work": "{{ dag.dag_id }}/{{ run_id }}"}

    def stage(name: str, **more: Any) -> StageOperator:
        return StageOperator(**{"task_id": name, "stage": name, **common, **more})

    version = stage("version")
    validate = stage("validate")
    profile = stage("profile", **on_mlx())
    recommend = stage("recommend")
    plan = stage("sweep_plan", arguments=["--workers", "{{ params.workers }}"], **on_mlx())
    workers = StageOperator.partial(
        task_id="sweep_worker",
        stage="sweep_worker",
        map_index_template="{{ task.arguments[1] }}",
        execution_timeout=timedelta(hours=12),
        **common,
        **on_mlx(),
    ).expand(arguments=plan.output)
    # No worker is started when the sweep is done already; what killed ones left undone, this stage does itself.
    sweep = stage("sweep", trigger_rule="none_failed", execution_timeout=timedelta(hours=12), **on_mlx())
    train = stage("train", execution_timeout=timedelta(hours=6), **on_mlx())
    evaluate = stage("evaluate", **on_mlx())
    register = stage("register", outlets=[EXPERIENCE])
    report = stage("report")
    chain(version, validate, profile, recommend, plan, workers, sweep, train, evaluate, register, report)
