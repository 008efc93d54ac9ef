"""Locks between the workers of a sweep that die with their holder, however it ends (SIGKILL, power, lost connection).

On one machine they are locked files, beside a SQLite database; across machines they are PostgreSQL advisory locks,
which the server drops with the session. `exclusive` makes the bookkeeping of a study one worker's at a time (SQLite
alone does not: two workers may pop the same waiting trial). `hold` marks a worker as alive for as long as it is, so
nobody needs heartbeats or timeouts to know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol


class Locks(Protocol):
    """Named locks of one study, as one worker sees them."""

    def hold(self, name: str) -> None:
        """Takes a lock until `close` (or until this process dies)."""

    def held(self, name: str) -> bool:
        """Whether somebody else holds that lock now."""

    def exclusive(self) -> Any:
        """Context manager: no other worker of the study is inside at the same time."""

    def renew(self) -> None:
        """Takes again what was taken with `hold` and got lost, with a connection for example."""

    def close(self) -> None:
        """Gives back everything that was taken with `hold`."""


class FileLocks:
    """Locked files in one folder. The folder must be on a local disk."""

    def __init__(self, folder: Path):
        from filelock import FileLock

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._mutex = FileLock(folder / "study.lock")
        self._mine: dict[str, Any] = {}

    def hold(self, name: str) -> None:
        from filelock import FileLock

        lock = FileLock(self._folder / f"{name}.lock")
        lock.acquire(timeout=0)
        self._mine[name] = lock

    def held(self, name: str) -> bool:
        from filelock import FileLock, Timeout

        path = self._folder / f"{name}.lock"
        if not path.exists():
            return False
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        path.unlink(missing_ok=True)
        lock.release()
        return False

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._mutex:
            yield

    def renew(self) -> None:
        pass

    def close(self) -> None:
        for name, lock in self._mine.items():
            (self._folder / f"{name}.lock").unlink(missing_ok=True)
            lock.release()
        self._mine.clear()


class DatabaseLocks:
    """PostgreSQL advisory locks on one connection kept open for this worker.

    Keepalives end the session of a machine that lost power within about a minute.
    """

    def __init__(self, url: str, study: str):
        import sqlalchemy

        self._engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
        self._study = study
        self._mine: list[str] = []
        self._connect()

    def _connect(self) -> None:
        self._connection = self._engine.connect()
        for option, seconds in (("idle", 30), ("interval", 10), ("count", 3)):
            self._run(f"SET tcp_keepalives_{option} = {seconds}")

    def _run(self, statement: str, **values: Any) -> Any:
        import sqlalchemy

        return self._connection.execute(sqlalchemy.text(statement), values)

    def _key(self, name: str) -> int:
        digest = hashlib.sha256(f"metapeft/{self._study}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    def hold(self, name: str) -> None:
        self._run("SELECT pg_advisory_lock(:key)", key=self._key(name))
        self._mine.append(name)

    def held(self, name: str) -> bool:
        if self._run("SELECT pg_try_advisory_lock(:key)", key=self._key(name)).scalar_one():
            self._run("SELECT pg_advisory_unlock(:key)", key=self._key(name))
            return False
        return True

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self._run("SELECT pg_advisory_lock(:key)", key=self._key("study"))
        try:
            yield
        finally:
            self._run("SELECT pg_advisory_unlock(:key)", key=self._key("study"))

    def renew(self) -> None:
        """A new session, which frees what the old one still held. Raises SQLAlchemyError while nobody answers."""
        with suppress(Exception):
            self._connection.invalidate()
            self._connection.close()
        self._connect()
        for name in self._mine:
            self._run("SELECT pg_advisory_lock(:key)", key=self._key(name))

    def close(self) -> None:
        with suppress(Exception):  # a lost connection holds nothing any more
            self._connection.close()
