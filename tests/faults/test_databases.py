"""A sweep whose database goes away and comes back, for good, or is locked by somebody else: no trial is lost."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metapeft.errors import MetapeftError
from metapeft.search import sweep
from metapeft.settings import TrackingSettings, home
from tests.faults.sound import check
from tests.search.postgresql import Server, postgresql
from tests.search.surrogate import Surrogate
from tests.search.test_sweep import TASK, events, given, identities, only_study, start, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture
def server() -> Iterator[Server]:
    with postgresql() as started:
        yield started


def ended(log: Path) -> int:
    return sum(n for event, n in events(log).items() if event.startswith("end"))


def begun_once(log: Path, found: sweep.Sweep, again: int) -> None:
    """Every trial of the sweep was trained; at most `again` were begun twice (what was claimed when the lock fell)."""
    seen = events(log)
    assert all(seen[f"end {identity}"] >= 1 for identity in identities(found))
    assert sum(n for event, n in seen.items() if event.startswith("begin")) <= len(found.trials) + again


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_a_server_that_restarts_in_the_middle(server: Server, tmp_path: Path, mode: str) -> None:
    """Three times, at whatever moment: while training, claiming and recording. Two workers."""
    log = tmp_path / "log"
    process = start(tmp_path, seconds=0.3, trials=14, workers=2, storage=server.url)
    for trials in (2, 5, 8):
        wait_for(lambda trials=trials: ended(log) >= trials, 240)
        server.stop(mode)
        time.sleep(2)
        server.start()
    assert process.wait(240) == 0
    found = sweep.sweep(Surrogate(log), TASK, given(14), storage=server.url)
    assert found.complete and found.reused == 14 and len(set(identities(found))) == 14
    begun_once(log, found, again=6)


def test_a_server_that_stays_away(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PATIENCE", 3.0)
    log = tmp_path / "log"

    class Stopping(Surrogate):
        def __call__(self, *arguments: Any) -> Any:
            found = super().__call__(*arguments)
            if ended(log) == 3:
                server.stop()
            return found

    with pytest.raises(MetapeftError, match="has not answered for 3 s") as caught:
        sweep.sweep(Stopping(log), TASK, given(6), storage=server.url)
    check(str(caught.value))
    assert "secret" not in str(caught.value)
    server.start()
    found = sweep.sweep(Surrogate(log), TASK, given(6), storage=server.url)
    assert found.complete and found.reused == 2, "the third had been trained and could not be told"
    begun_once(log, found, again=1)


def test_sqlite_that_another_process_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than SQLite itself would wait."""
    from metapeft.search.sweep import _Book

    log = tmp_path / "log"
    opened = _Book.open

    def impatient(self: Any, *arguments: Any, **options: Any) -> None:
        opened(self, *arguments, **options)
        import sqlalchemy

        sqlalchemy.event.listen(self.database.engine, "connect", lambda c, _: c.execute("PRAGMA busy_timeout = 50"))
        self.database.engine.dispose()

    monkeypatch.setattr(_Book, "open", impatient)
    done: list[sweep.Sweep] = []
    worker = threading.Thread(target=lambda: done.append(sweep.sweep(Surrogate(log, 0.1), TASK, given(6))))
    worker.start()
    wait_for(lambda: ended(log) >= 2, 120)
    path = home() / "sweeps" / f"{only_study()}.db"
    other = sqlite3.connect(path, timeout=30)
    other.execute("BEGIN EXCLUSIVE")
    before = ended(log)
    time.sleep(2)
    assert ended(log) <= before + 1, "nothing goes on while nothing can be written down"
    other.rollback()
    other.close()
    worker.join(120)
    assert done and done[0].complete
    begun_once(log, done[0], again=0)


def test_a_tracking_server_that_is_gone() -> None:
    from metapeft.tracking.client import connect

    with pytest.raises(MetapeftError) as caught:
        connect(TrackingSettings(uri="http://127.0.0.1:9"))
    check(str(caught.value))
