"""The tuning DAG: what it promises when it is parsed, and real runs on a tiny backbone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.backbones.tiny import tiny_folder
from tests.dags.conftest import ROOT, airflow_environment
from tests.stages.made import spam_file

STAGES = [
    *("version", "validate", "profile", "recommend", "sweep_plan", "sweep_worker", "sweep"),
    *("train", "evaluate", "register", "report"),
]


@pytest.fixture(scope="module")
def dag(airflow_home: Path) -> Any:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(ROOT / "dags"))
    assert not bag.import_errors
    return bag.dags["tune_task"]


def configuration(folder: Path) -> dict[str, Any]:
    """A trigger's configuration for seconds of work."""
    small = {"trials": 2, "trial_steps": 2, "steps": 3, "seed": 1, "workers": 2}
    return {"task": str(spam_file(folder)), "backbone": str(tiny_folder("llama")), **small}


def test_stages_follow_one_another(dag: Any) -> None:
    assert [task.task_id for task in dag.topological_sort()] == STAGES
    assert {task.task_id for task in dag.tasks if task.is_mapped} == {"sweep_worker"}
    assert all(task.stage == task.task_id for task in dag.tasks if not task.is_mapped)


def test_only_what_trains_or_evaluates_waits_for_a_slot(dag: Any) -> None:
    slots = {"profile", "sweep_plan", "sweep_worker", "sweep", "train", "evaluate"}
    assert {task.task_id for task in dag.tasks if task.pool == "mlx"} == slots


@pytest.mark.parametrize(
    "wrong",
    [
        {"trials": 0},
        {"trials": "many"},
        {"prefer": "beauty"},
        {"max_seconds": -1},
        {"task": ""},
        {"seed": -1},
        {"steps": None},
        {"workers": 0},
    ],
)
def test_the_form_refuses_what_makes_no_sense(dag: Any, wrong: dict[str, Any]) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    params = dag.params.deep_merge(wrong) if hasattr(dag.params, "deep_merge") else {**dag.params, **wrong}
    name, value = next(iter(wrong.items()))
    with pytest.raises((ParamValidationError, ValueError)):
        dag.params.get_param(name).resolve(value)
    assert params


def test_the_form_offers_the_projects_defaults_and_sets_settings_that_exist(dag: Any) -> None:
    from metapeft.settings import load_settings
    from metapeft.stages.stage import dotted

    defaults = load_settings(ROOT / "params.yaml").model_dump()
    form = dag.tasks[0].form
    assert set(form) | {"workers"} == set(dag.params)
    for name, setting in (form | {"workers": "sweep.workers"}).items():
        assert dag.params[name] == dotted(defaults, setting)


def test_bad_input_fails_at_once_and_stops_the_rest(dag: Any, tmp_path: Path) -> None:
    run = dag.test(run_conf={"task": str(tmp_path / "missing.jsonl")})
    states = {ti.task_id: (str(ti.state), ti.try_number) for ti in run.get_task_instances()}
    assert states["version"] == ("failed", 1), "bad input must not be tried again"
    assert {state for name, (state, _) in states.items() if name != "version"} == {"upstream_failed"}


@pytest.mark.slow
def test_a_run_registers_an_adapter_and_a_second_run_has_its_own_folder(dag: Any, tmp_path: Path, home: Path) -> None:
    run = dag.test(run_conf=configuration(tmp_path))
    states = sorted((ti.task_id, ti.map_index, str(ti.state)) for ti in run.get_task_instances())
    mapped = [("sweep_worker", 0, "success"), ("sweep_worker", 1, "success")]
    assert states == sorted([(name, -1, "success") for name in STAGES if name != "sweep_worker"] + mapped)
    (work,) = (home / "airflow" / "tune_task").iterdir()
    trial = json.loads((work / "evaluate" / "trial.json").read_text())
    assert trial["budget"] == 3 and trial["seed"] == 1 and trial["score"] and trial["untuned_score"]
    assert len((work / "sweep" / "trials.jsonl").read_text().splitlines()) == 2
    model = json.loads((work / "register" / "model.json").read_text())
    assert model["version"] == 1 and model["alias"] == "champion"


@pytest.mark.slow
def test_airflow_dags_test(airflow_home: Path, tmp_path: Path, home: Path) -> None:
    """The command that people use, as a real process."""
    environment = os.environ | airflow_environment(airflow_home)
    command = [sys.executable, "-m", "airflow", "dags", "test", "tune_task", "-c", json.dumps(configuration(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (work,) = (home / "airflow" / "tune_task").iterdir()
    assert json.loads((work / "register" / "model.json").read_text())["model"].startswith("task-spam")
