"""A real PostgreSQL server for tests, which can be stopped and started. Skips where none is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BINARIES = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), reverse=True)]
INITDB = next((Path(path) for path in BINARIES if path), None)


@dataclass(frozen=True)
class Server:
    """A server of its own in `folder`; `url` has a user and a password."""

    url: str
    folder: str
    control: list[str]  # the command pg_ctl
    flags: str

    def start(self) -> None:
        self._do("-w", "-l", f"{self.folder}/log", "-o", self.flags, "start")

    def stop(self, mode: str = "immediate") -> None:
        """mode: immediate (as a crash), fast (sessions are ended in order)."""
        self._do("-m", mode, "stop")

    def _do(self, *words: str) -> None:
        subprocess.run([*self.control, *words], check=True, capture_output=True, cwd=self.folder)


@contextmanager
def postgresql() -> Iterator[Server]:
    """Started, and stopped at the end."""
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
        server = Server(f"postgresql://sweeper:secret@127.0.0.1:{port}/postgres", folder, control, flags)
        server.start()
        try:
            yield server
        finally:
            server.stop()
