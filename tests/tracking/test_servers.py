"""Notes that servers leave, and messages that never make a promotion fail."""

from __future__ import annotations

import http.server
import json
import os
import platform
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from metapeft.tracking import servers


class Listener(http.server.BaseHTTPRequestHandler):
    heard: ClassVar[list[tuple[str, str, str]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.append((self.path, self.headers["Authorization"], json.loads(body)["model"]))
        self.send_response(202)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> object:
    Listener.heard = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_listed_server_is_told_with_its_own_token(home: Path, url: str) -> None:
    assert servers.tell("task-a") == 0
    with servers.listed(url, "secret"):
        [note] = servers.folder().glob("*.json")
        assert stat.S_IMODE(note.stat().st_mode) == 0o600
        assert servers.tell("task-a") == 1
    assert servers.tell("task-a") == 0
    assert Listener.heard == [("/v1/deploy", "Bearer secret", "task-a")]


def test_a_server_elsewhere_is_named_by_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_SERVER", url + "/")
    monkeypatch.setenv("METAPEFT_SERVER_KEY", "mp-key")
    assert servers.tell("task-b") == 1
    assert Listener.heard == [("/v1/deploy", "Bearer mp-key", "task-b")]


LISTED = """
import sys, time
from metapeft.tracking import servers
with servers.listed(sys.argv[1], "theirs"):
    print("listed", flush=True)
    time.sleep(60)
"""


def killed(url: str) -> Path:
    """The note of a server that ended by SIGKILL."""
    process = subprocess.Popen([sys.executable, "-c", LISTED, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "listed\n"
    assert url in [address for address, _ in servers.known()]
    process.kill()
    process.wait()
    return next(path for path in servers.folder().glob(f"*-{process.pid}.json"))


def test_killed_damaged_and_silent_servers_are_no_failure(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = killed("http://127.0.0.1:1")
    (servers.folder() / "torn.json").write_text("{torn", encoding="utf-8")
    (servers.folder() / "list.json").write_text("[]", encoding="utf-8")
    assert servers.tell("task-c") == 0 and capsys.readouterr().err == ""
    assert list(servers.gone()) == [("http://127.0.0.1:1", note)]
    with servers.listed("http://127.0.0.1:1", "x"):
        assert servers.tell("task-c") == 0
        assert list(servers.gone()) == [], "another one serves there"
    assert "could not be told" in capsys.readouterr().err
    assert not note.exists()


def test_a_number_that_was_given_to_another_process_is_no_server(home: Path) -> None:
    note = killed("http://127.0.0.1:1")
    moved = note.with_name(f"{note.stem.rpartition('-')[0]}-{os.getppid()}.json")
    note.rename(moved)
    assert list(servers.known()) == [] and [path for _, path in servers.gone()] == [moved]


def test_notes_of_another_container_are_left_alone(home: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in every container; 1 lives in all of them
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "a/b c")
        theirs = servers.listed("http://127.0.0.1:1", "theirs")
        theirs.__enter__()
    with servers.listed(url, "mine"):
        assert len(list(servers.folder().glob("*.json"))) == 2, "equal numbers, and none overwrites the other"
        assert list(servers.known()) == [(url, "mine")]
    [left] = servers.folder().glob("*.json")
    assert left.name == "a-b-c-1.json"
    assert list(servers.known()) == list(servers.gone()) == [], "whether it lives cannot be seen from here"
    theirs.__exit__(None, None, None)
    assert not left.exists()
