from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from metapeft.data.task import Example, Task
from metapeft.settings import Settings, home, load_settings


@pytest.fixture
def no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A METAPEFT_HOME in which MLflow has never run, and nothing else in the environment."""
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "home with space"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return load_settings()


@pytest.fixture
def settings(no_database: Settings, database: Path) -> Settings:
    """The same with an empty database."""
    home().mkdir()
    shutil.copy(database, home() / "mlflow.db")
    return no_database


@pytest.fixture
def task() -> Task:
    rows = tuple(Example(f"text {n}", "yes" if n % 2 else "no") for n in range(12))
    splits = (rows[:8], rows[8:10], rows[10:])
    return Task("sms_spam", "0123456789abcdef", "classification", "accuracy", *splits, ("no", "yes"), dvc_id="d" * 32)
