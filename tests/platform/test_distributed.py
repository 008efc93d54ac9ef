"""The platform as a team runs it: PostgreSQL, Redis, S3, MLflow, Airflow with two Celery workers; one is killed in
mid-sweep, and everything is restored from a backup.

`make test-platform` runs it: it needs the servers (Debian: apt-get install postgresql redis-server) and the packages of
docker/requirements.txt and tests/platform/requirements.txt, which that target installs beside the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import urllib.error
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backbones.tiny import tiny_folder
from tests.platform.services import DATABASES, Platform, until
from tests.stages.made import spam_file

pytestmark = [
    pytest.mark.skipif("METAPEFT_TEST_PLATFORM" not in os.environ, reason="make test-platform runs it"),
    pytest.mark.timeout(3000),
]
TRIALS = 10


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """One for all tests of this file, which come in their order."""
    folder = tmp_path_factory.mktemp("platform")
    found = Platform(folder)
    try:
        found.up()
        yield found
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}")
        raise
    finally:
        found.down()


def states(platform: Platform) -> Counter[str]:
    """States of the sweep's Optuna trials that were not given up for another."""
    import psycopg

    query = """select t.state::text, count(*) from trials t where not exists (select 1 from trial_user_attributes a
               where a.trial_id = t.trial_id and a.key = 'void') group by 1"""
    try:
        with psycopg.connect(platform.dsn("sweeps")) as connection:
            return Counter(dict(connection.execute(query).fetchall()))
    except psycopg.errors.UndefinedTable as error:
        raise OSError(error) from error


def test_a_worker_killed_in_mid_sweep_costs_nothing(platform: Platform, tmp_path: Path) -> None:
    path = "/dags/tune_task"
    until("the DAG", 600, lambda: platform.rest(path)["dag_id"] == "tune_task")
    pools = {pool["name"]: pool["slots"] for pool in platform.rest("/pools")["pools"]}
    assert pools["mlx"] == 2 and pools["dvc"] == 1, "made by Airflow's own start"
    platform.rest(path, "PATCH", {"is_paused": False})
    small = {"task": str(spam_file(tmp_path)), "backbone": str(tiny_folder("llama")), "seed": 1}
    form = small | {"trials": TRIALS, "trial_steps": 40, "steps": 5, "workers": 2}
    with pytest.raises(urllib.error.HTTPError, match="400"):
        platform.rest(f"{path}/dagRuns", "POST", {"logical_date": None, "conf": form | {"trials": 0}})
    run = platform.rest(f"{path}/dagRuns", "POST", {"logical_date": None, "conf": form})["dag_run_id"]

    def tasks() -> list[dict[str, Any]]:
        return list(platform.rest(f"{path}/dagRuns/{run}/taskInstances")["task_instances"])

    def both_at_work() -> bool:
        now = states(platform)
        return now["COMPLETE"] >= 1 and now["RUNNING"] >= 2

    until("two workers in the sweep", 900, both_at_work)
    hosts = {t["hostname"] for t in tasks() if t["task_id"] == "sweep_worker" and t["state"] == "running"}
    assert hosts, "mapped tasks are running"
    before = states(platform)
    platform.kill("worker-1")
    assert before["COMPLETE"] < TRIALS, "the kill comes in the middle"

    def ended() -> str | None:
        state = platform.rest(f"{path}/dagRuns/{run}")["state"]
        return state if state in ("success", "failed") else None

    outcome = until("the run to end", 900, ended)
    rows = [(t["task_id"], t["map_index"], t["state"], t["try_number"]) for t in tasks()]
    assert outcome == "success", rows
    assert max(number for name, _, _, number in rows if name == "sweep_worker") == 2, (
        "one worker's task was tried again"
    )

    (work,) = (platform.home / "airflow" / "tune_task").iterdir()
    trials = [json.loads(line) for line in (work / "sweep/trials.jsonl").read_text().splitlines()]
    ids = [trial["id"] for trial in trials]
    assert len(ids) == len(set(ids)) == TRIALS and not any(trial["status"] == "failed" for trial in trials)
    from mlflow import MlflowClient

    client = MlflowClient(platform.environment["MLFLOW_TRACKING_URI"])
    (parent,) = client.search_runs(["1"], "tags.selection != ''")
    nested = client.search_runs(["1"], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert Counter(run.data.tags["trial_id"] for run in nested) == Counter(ids), "every trial is one run"
    (version,) = client.search_model_versions("")
    assert version.tags["dvc_id"] and json.loads((work / "register/model.json").read_text())["alias"] == "champion"


def kept(platform: Platform, folder: Path) -> dict[str, Any]:
    """What people would miss: Airflow's runs, MLflow's runs and models, an adapter's weights, the sweep's trials."""
    from mlflow import MlflowClient

    client = MlflowClient(platform.environment["MLFLOW_TRACKING_URI"])
    runs = client.search_runs(["1"])
    (version,) = client.search_model_versions("")
    weights = client.download_artifacts(version.run_id, f"adapters/{version.tags['trial']}", str(folder))
    return {
        "airflow": [(r["dag_run_id"], r["state"]) for r in platform.rest("/dags/tune_task/dagRuns")["dag_runs"]],
        "runs": sorted((r.info.run_id, r.info.status, len(r.data.metrics), r.data.tags["task"]) for r in runs),
        "model": (version.name, version.tags, client.get_registered_model(version.name).aliases),
        "weights": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(weights).iterdir())},
        "trials": states(platform),
    }


def test_a_backup_restored_has_everything(platform: Platform, tmp_path: Path) -> None:
    """The commands of docs/operations.md, on what the test above has left: databases dropped, another store."""
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    before = kept(platform, tmp_path / "before")
    assert before["airflow"] and before["runs"] and before["weights"]
    for name in DATABASES:
        platform.postgres("pg_dump", "--format=custom", f"--file={tmp_path / name}.dump", name)
    platform.stop(*(name for name in platform.processes if name not in ("postgresql", "redis")))
    shutil.copytree(platform.folder / "store", tmp_path / "store")
    shutil.rmtree(platform.folder / "store")
    platform.create(DATABASES, drop=True)

    for name in DATABASES:
        platform.postgres(
            "pg_restore", f"--dbname={name}", "--clean", "--if-exists", "--exit-on-error", f"{tmp_path / name}.dump"
        )
    platform.start_store(tmp_path / "store")
    platform.run(sys.executable, "-m", "airflow", "db", "migrate")
    platform.start_mlflow()
    platform.start_api()
    platform.answer()
    assert kept(platform, tmp_path / "after") == before
