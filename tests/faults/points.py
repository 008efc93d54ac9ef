"""Fault points: every place where a process changes a file, counted; at the N-th, the process dies or the disk is full.

`arm` is called once in a process that is about to be harmed. From then on these count, where they touch one of `roots`:
opening for writing, each write (half of it is done first), flushing, renaming, linking, deleting, making folders, the
files that MLX and pyarrow write themselves (half of each is there), and SQLite's commits. Lock files
do not count: they hold nothing.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

Kind = Literal["count", "kill", "full"]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
AUDITED = ("os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "os.truncate")
SPACE = ("open", "write", "os.mkdir", "os.link", "save", "fsync", "commit")  # what a full disk refuses

_write, _fsync, _open = os.write, os.fsync, io.open


class Points:
    """kind "count" only counts; "kill" ends the process at point `at` (from 1); "full" refuses it and all later ones.

    log: a file that gets one line per point.
    """

    def __init__(self, roots: Sequence[str], kind: Kind, at: int, log: str):
        self.roots = tuple(os.path.realpath(root) + os.sep for root in roots)
        self.kind, self.at, self.count = kind, at, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.files: dict[int, str] = {}
        self.inside = False

    def watched(self, path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        text = os.path.abspath(os.fsdecode(path))
        return text.startswith(self.roots) and not text.endswith(".lock") and "/slots/" not in text

    def reached(self, name: str, path: Any, half: Callable[[], object] = lambda: None) -> None:
        """One point. half: does a part of what is about to be done."""
        if self.inside:
            return
        self.inside = True
        try:
            self.count += 1
            place = os.fsdecode(path)
            _write(self.log, f"{self.count} {name} {place}\n".encode(errors="replace"))
            if self.kind == "kill" and self.count == self.at:
                half()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "full" and self.count >= self.at and name in SPACE:
                half()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
        finally:
            self.inside = False


def arm(roots: Sequence[str], kind: Kind, at: int, log: str) -> None:
    """Count from now on in this process, and do harm at the point `at`. Cannot be taken back."""
    points = Points(roots, kind, at, log)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED and points.watched(arguments[0]):
            points.reached(event, arguments[0])
        elif event == "open" and int(arguments[2] or 0) & WRITING and points.watched(arguments[0]):
            points.reached("open", arguments[0])

    sys.addaudithook(audit)
    _patch_descriptors(points)
    _patch_files(points)
    _patch_libraries(points)
    _patch_commits(points)


def _patch_descriptors(points: Points) -> None:
    def place(file: int) -> str | None:
        try:
            return os.readlink(f"/proc/self/fd/{file}")
        except OSError:
            return None

    def write(file: int, data: bytes) -> int:
        if points.watched(path := place(file)):
            points.reached("write", path, lambda: _write(file, data[: len(data) // 2]))
        return _write(file, data)

    def fsync(file: int) -> None:
        if points.watched(path := place(file if isinstance(file, int) else file.fileno())):
            points.reached("fsync", path)
        _fsync(file)

    os.write, os.fsync = write, fsync  # type: ignore[assignment]


def _patch_files(points: Points) -> None:
    """Python's own files: each `write` is a point, with half of it on disk."""

    def opened(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        found = _open(file, mode, *more, **options)
        if not set(mode) & set("wax+") or not points.watched(file):
            return found
        write = found.write

        def counted(data: Any) -> int:
            def half() -> None:
                write(data[: len(data) // 2])
                found.flush()

            points.reached("write", file, half)
            return int(write(data))

        try:
            found.write = counted
        except AttributeError:  # a buffered or raw file takes no attributes
            return _Counted(found, counted)
        return found

    io.open = builtins.open = opened  # type: ignore[assignment]


class _Counted:
    """A binary file whose `write` is another."""

    def __init__(self, file: Any, write: Callable[[Any], int]):
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Counted:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)


def _patch_libraries(points: Points) -> None:
    """MLX and pyarrow write from C++: their whole files, of which half is there at the point."""
    import mlx.core as mx
    import pyarrow.parquet as parquet

    def wrap(module: Any, name: str, place: Callable[..., Any]) -> None:
        original = getattr(module, name)

        def saving(*arguments: Any, **options: Any) -> Any:
            path = place(*arguments)
            if points.watched(path):

                def half() -> None:
                    original(*arguments, **options)
                    os.truncate(path, os.path.getsize(path) // 2)

                points.reached("save", path, half)
            return original(*arguments, **options)

        setattr(module, name, saving)

    wrap(mx, "save_safetensors", lambda path, *_: path)
    wrap(parquet, "write_table", lambda table, path, *_: path)


def _patch_commits(points: Points) -> None:
    class Connection(sqlite3.Connection):
        place = ""

        def commit(self) -> None:
            if self.in_transaction and points.watched(self.place):
                points.reached("commit", self.place)
            super().commit()

    connect = sqlite3.connect

    def connected(database: Any, *arguments: Any, **options: Any) -> Any:
        options.setdefault("factory", Connection)
        found = connect(database, *arguments, **options)
        if isinstance(found, Connection):
            found.place = str(database).removeprefix("file:").partition("?")[0]
        return found

    sqlite3.connect = sqlite3.dbapi2.connect = connected  # type: ignore[assignment]


def read(log: Path) -> list[tuple[str, str]]:
    """(kind of point, path) of every point that was reached."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [(line.split(" ", 2)[1], line.split(" ", 2)[2]) for line in lines]
