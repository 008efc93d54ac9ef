"""Whatever answers at an address, and whatever the address says: who was only to be told never fails."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator

import pytest

from metapeft.airflow import notify
from metapeft.monitoring import channels, served
from metapeft.tracking import servers
from tests.monitoring.test_channels import ALERT, AT


class Tls(socketserver.StreamRequestHandler):
    """What a server that speaks TLS only says to HTTP."""

    def handle(self) -> None:
        self.request.recv(65536)
        self.wfile.write(b"\x15\x03\x01\r\n")


@pytest.fixture(params=["no HTTP", "no port", "no scheme"])
def address(request: pytest.FixtureRequest, home: object) -> Iterator[str]:
    if request.param != "no HTTP":
        yield "http://localhost:port" if request.param == "no port" else "localhost"
        return
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tls) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_alert_that_nobody_takes_is_said(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not channels.Webhook(address)(ALERT, AT, False)
    assert not channels.Alertmanager(address)(ALERT, AT, False)
    said = capsys.readouterr().err
    assert channels.URL in said and channels.ALERTMANAGER in said


def test_a_task_that_failed_fails_no_more(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notify.URL, address)
    assert not notify.send("a message")


def test_a_server_is_not_reached_and_not_told(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METAPEFT_SERVER", address)
    assert servers.tell("task-a") == 0
    assert "could not be told" in capsys.readouterr().err
    (found,), counts = served.look({})
    assert not found.reached and counts == {}
