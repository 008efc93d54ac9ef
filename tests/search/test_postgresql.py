"""A sweep on a real PostgreSQL server, started here. Skipped where the server or its driver is not installed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from metapeft.search import sweep
from tests.search.postgresql import postgresql
from tests.search.surrogate import Surrogate
from tests.search.test_sweep import TASK, check_resumed, events, given, start, wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as started:
        yield started.url


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
