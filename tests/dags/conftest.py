"""A private Airflow for the tests: its variables must stand before Airflow is first imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def airflow_environment(home: Path) -> dict[str, str]:
    """Variables of an Airflow that keeps everything in `home` and sees this project's DAGs and plugins."""
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }


HOME = Path(tempfile.mkdtemp(prefix="metapeft-airflow-"))
os.environ.update(airflow_environment(HOME))


@pytest.fixture(scope="session")
def airflow_home() -> Iterator[Path]:
    """An initialised Airflow database."""
    from airflow.utils.db import initdb

    initdb()
    yield HOME
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of the test's own, in Git and DVC, with a remote; no task file is there yet."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    shutil.copytree(ROOT / "dags", folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", folder)
    dvc = (sys.executable, "-m", "dvc")
    for command in (("git", "init", "-q"), (*dvc, "init", "-q"), (*dvc, "remote", "add", "-q", "-d", "r", "../remote")):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def run(project: Path, dag: str, **given: Any) -> dict[tuple[str, int], tuple[str, int]]:
    """`dag.test(**given)` in the project: (task, part) -> (state, number of tries)."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(project / "dags"))
    assert not bag.import_errors
    instances = bag.dags[dag].test(**given).get_task_instances()
    return {(ti.task_id, ti.map_index): (str(ti.state), ti.try_number) for ti in instances}
