"""A sweep on a real PostgreSQL server, started here. Skipped where the server or its driver is not installed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from metapeft.search import sweep
from tests.search.surrogate import Surrogate
from tests.search.test_sweep import TASK, check_resumed, events, given, start, wait_for

BINARIES = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), reverse=True)]
INITDB = next((Path(path) for path in BINARIES if path), None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("psycopg")
    if INITDB is None:
        pytest.skip("no PostgreSQL server is installed")
    root = os.geteuid() == 0
    if root and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root")
    person = ["runuser", "-u", "postgres", "--"] if root else []
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        if root:
            shutil.chown(folder, "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        data = f"{folder}/data"
        command = [*person, str(INITDB), "-D", data, "-A", "trust", "-U", "sweeper", "--no-sync", "-E", "UTF8"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        flags = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control = [*person, str(INITDB.with_name("pg_ctl")), "-D", data]
        subprocess.run(
            [*control, "-w", "-l", f"{folder}/log", "-o", flags, "start"], check=True, capture_output=True, cwd=folder
        )
        try:
            yield f"postgresql://sweeper:secret@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd=folder)


def test_workers_on_two_sides_share_a_study(server: str, tmp_path: Path) -> None:
    processes = [start(tmp_path, seconds=0.1, trials=12, workers=n, storage=server) for n in (1, 2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    log = tmp_path / "log"
    found = sweep.sweep(Surrogate(log), TASK, given(12), storage=server)
    assert found.complete and found.reused == 12 and set(events(log).values()) == {1} and len(events(log)) == 24
    assert "secret" not in found.storage and "sweeper@127.0.0.1" in found.storage
    assert sweep.load(found.study, TASK, given(12), storage=server).trials == found.trials


def test_sigkill_frees_the_trial_at_once(server: str, tmp_path: Path) -> None:
    settings = given(5).model_copy(update={"seed": 7})  # a study of its own
    process = start(tmp_path, seconds=0.5, trials=5, storage=server, seed=7)
    try:
        wait_for(lambda: sum(n for e, n in events(tmp_path / "log").items() if e.startswith("begin")) == 3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed = (tmp_path / "log").read_text().split()[-1]
    found = sweep.sweep(Surrogate(tmp_path / "log"), TASK, settings, storage=server)
    check_resumed(tmp_path, found, 5, killed)
