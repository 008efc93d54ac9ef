"""Every test has a home of its own; only the converted packaged backbone is shared: making it costs seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers: one thread each, or they fight for the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import metapeft.runtime  # noqa: F401  (opens the fast BLAS before anything imports mlx)

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

ROOT = Path(__file__).resolve().parent.parent
SMOLLM = "smollm2-135m-instruct"


def shared_backbones() -> Path:
    """The converted backbones that all tests share: METAPEFT_TEST_CACHE/backbones, by default the checkout's."""
    return Path(os.environ.get("METAPEFT_TEST_CACHE", ROOT / ".metapeft")) / "backbones"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty METAPEFT_HOME of this test's own, with the packaged backbone in it if that was ever converted."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "backbones").mkdir()
    monkeypatch.setenv("METAPEFT_HOME", str(folder))
    monkeypatch.setenv("METAPEFT_SLOTS", str(folder / "slots"))  # no waiting for what else trains on this machine
    if (shared_backbones() / SMOLLM / "manifest.json").exists():
        (folder / "backbones" / SMOLLM).symlink_to(shared_backbones() / SMOLLM)
    return folder


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, made once: its migrations take seconds."""
    from metapeft.settings import load_settings
    from metapeft.tracking.client import connect

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(path.parent))
        connect(load_settings(tracking={"uri": f"sqlite:///{path}"}).tracking)
    return path


@pytest.fixture(scope="session")
def smollm() -> Iterator[Backbone]:
    """The packaged backbone, converted once per checkout and loaded once per session. Leave it as you found it."""
    from metapeft.backbones import load

    before = os.environ.get("METAPEFT_HOME")
    os.environ["METAPEFT_HOME"] = str(shared_backbones().parent)
    try:
        yield load(SMOLLM)
    finally:
        if before is None:
            os.environ.pop("METAPEFT_HOME", None)
        else:
            os.environ["METAPEFT_HOME"] = before
