"""What every DAG promises when it is parsed, and what they share: assets, pools, alerts."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metapeft.airflow import notify, pools
from tests.dags.conftest import ROOT, airflow_environment

DAGS = {"tune_task", "grow_and_retrain", "version_datasets", "monitor_selection"}
HEAVY = {
    *("mlx", "mlflow", "great_expectations", "optuna", "dvc", "transformers", "pandas", "numpy", "sklearn"),
    *("matplotlib", "datasets"),
}


@pytest.fixture(scope="module")
def dags(airflow_home: Path) -> dict[str, Any]:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(ROOT / "dags"))
    assert not bag.import_errors
    return bag.dags


def test_the_dags_are_there(dags: dict[str, Any]) -> None:
    assert set(dags) == DAGS


@pytest.mark.parametrize("name", sorted(DAGS))
def test_every_dag_is_documented_owned_limited_and_watched(dags: dict[str, Any], name: str) -> None:
    dag = dags[name]
    assert dag.doc_md and dag.description and "metapeft" in dag.tags and dag.dagrun_timeout and not dag.catchup
    (deadline,) = dag.deadline
    assert deadline.interval < dag.dagrun_timeout, "people hear of it before it is cut"
    for task in dag.tasks:
        assert task.owner == "metapeft" and task.retries >= 1 and task.execution_timeout <= dag.dagrun_timeout
        assert task.pool in {pools.MLX, pools.DVC, "default_pool"}
        callbacks = task.on_failure_callback
        assert notify.failed in (callbacks if isinstance(callbacks, list | tuple) else [callbacks])
    assert not dag.has_on_failure_callback, "a callback of a DAG breaks `airflow dags test`"


def test_assets_connect_the_dags(dags: dict[str, Any]) -> None:
    from airflow.sdk import AssetAny

    def updates(name: str) -> set[str]:
        return {asset.name for task in dags[name].tasks for asset in task.outlets}

    def starts(name: str) -> set[str]:
        condition = getattr(dags[name].timetable, "asset_condition", None)
        return {asset.name for asset in condition.objects} if condition is not None else set()

    assert updates("version_datasets") == {"datasets"} and updates("monitor_selection") == {"degraded"}
    assert starts("grow_and_retrain") == {"datasets", "degraded"}
    assert isinstance(dags["grow_and_retrain"].timetable.asset_condition, AssetAny), "either of them starts it"
    assert "meta-model" in updates("grow_and_retrain")
    assert updates("tune_task") == {"experience"} and not starts("tune_task")


def test_scheduled_dags_can_be_filled_in(dags: dict[str, Any]) -> None:
    """`airflow backfill create` takes them, and no task asks for the date: a run does what is due when it runs."""
    scheduled = [dag for dag in dags.values() if dag.timetable.can_be_scheduled]
    assert {dag.dag_id for dag in scheduled} == set(dags) - {"tune_task"}
    for dag in scheduled:
        assert dag.max_active_runs == 1, "runs of several dates come one after another"
        for task in dag.tasks:
            given = str([getattr(task, name, None) for name in task.template_fields])
            assert not re.search(r"\b(ds|ts|logical_date|data_interval\w*)\b", given), task.task_id


def test_the_commands_that_dags_run_exist(dags: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from metapeft import cli

    for dag, name in (("grow_and_retrain", "grow"), ("grow_and_retrain", "retrain"), ("monitor_selection", "monitor")):
        task = dags[dag].get_task(name)
        assert cli.main([*task.arguments, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(option in text for option in (*task.form.values(), "--json"))


def test_parsing_is_fast_and_imports_nothing_heavy(airflow_home: Path) -> None:
    """All DAGs under a second beyond Airflow's own import, in a fresh interpreter."""
    script = f"""
import sys, time
from airflow.sdk import DAG, Param, BaseOperator, Asset, AssetOrTimeSchedule, CronTriggerTimetable, DeadlineAlert, task
from airflow.listeners import hookimpl
import pydantic, yaml
before, start = set(sys.modules), time.process_time()
import runpy
for path in {sorted(map(str, (ROOT / "dags").glob("*.py")))!r}:
    runpy.run_path(path)
print(time.process_time() - start)
print(" ".join({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | airflow_environment(airflow_home),
    )
    seconds, loaded = done.stdout.strip().splitlines()[-2:]
    assert float(seconds) < 1.0
    assert not HEAVY & set(loaded.split())


def test_the_plugin_is_registered(airflow_home: Path) -> None:
    from airflow.plugins_manager import get_plugin_info

    plugin = next(p for p in get_plugin_info() if p["name"] == "metapeft")
    assert "MLflowRunLink" in json.dumps(plugin, default=str)
    assert plugin["listeners"] == ["metapeft.airflow.pools"]


def test_pools_are_made_when_a_part_of_airflow_starts(airflow_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Airflow's own hook; what somebody changed since stays."""
    from airflow.jobs.job import Job
    from airflow.models.pool import Pool

    monkeypatch.setenv("METAPEFT_MLX_SLOTS", "3")
    Job()
    made = {pool.pool: pool.slots for pool in Pool.get_pools()}
    assert made[pools.MLX] == 3 and made[pools.DVC] == 1
    Pool.create_or_update_pool(pools.MLX, 5, "more machines", include_deferred=False)
    assert pools.ensure() == []
    assert Pool.get_pool(pools.MLX).slots == 5
    monkeypatch.setenv("METAPEFT_MLX_SLOTS", "two")
    assert pools.mlx_slots() == 1


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A real HTTP server where alerts arrive."""
    messages: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("METAPEFT_ALERT_URL", f"http://127.0.0.1:{server.server_port}/hook")
    yield messages
    server.shutdown()
    server.server_close()


def test_a_failure_and_a_late_run_are_told(receiver: list[Any]) -> None:
    ti = SimpleNamespace(
        dag_id="tune_task", task_id="sweep_worker", run_id="manual", map_index=2, log_url="http://x/log"
    )
    notify.failed({"task_instance": ti, "exception": ValueError("no such\n file")})
    asyncio.run(notify.late(context={"dag_run": {"dag_id": "tune_task", "dag_run_id": "manual"}}))
    assert [message["text"] for message in receiver] == [
        "metapeft: tune_task.sweep_worker, run manual, part 2 failed: no such file http://x/log",
        "metapeft: tune_task, run manual is later than it should be",
    ]


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/closed", "nonsense"])
def test_an_alert_that_cannot_be_delivered_breaks_nothing(monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    monkeypatch.delenv("METAPEFT_ALERT_URL", raising=False)
    if url:
        monkeypatch.setenv("METAPEFT_ALERT_URL", url)
    assert not notify.send("text")
    notify.failed({})
