"""`metapeft serve` flooded: more requests than it takes, bodies too large, clients too slow, and no HTTP at all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest

from tests.backbones.tiny import tiny_folder
from tests.serving.made import Server, serving

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
CLIENTS, ASKED = 64, 400


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("flooded")
    shutil.copytree(tiny_folder("llama"), home / "tiny")
    options = ("--rows", "4", "--queue", "8", "--timeout", "60", "--poll-seconds", "3600")
    with serving(home, str(home / "tiny"), *options) as running:
        yield running


def write(client: httpx.Client, tokens: int = 8) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": tokens})


def memory(server: Server) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def address(server: Server) -> tuple[str, int]:
    parsed = urlparse(server.url)
    assert parsed.hostname and parsed.port
    return "127.0.0.1", parsed.port


def test_more_than_it_takes(server: Server, figure: Any) -> None:
    with server.client(limits=httpx.Limits(max_connections=CLIENTS)) as client:
        text = write(client).json()["choices"][0]["text"]
        before = memory(server)
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(lambda n: write(client), range(ASKED)))
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) <= {200, 429} and statuses[200] >= 12
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        assert {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200} == {text}
        assert write(client).json()["choices"][0]["text"] == text
        assert client.get("/healthz").status_code == 200
    figure(f"{CLIENTS} clients, {ASKED} requests: {dict(statuses)}; memory {before:.0f} -> {memory(server):.0f} MiB")
    assert memory(server) < before + 300


def test_bodies_too_large(server: Server) -> None:
    """Said to be so, and not said: neither is read to its end."""
    with server.client() as client:
        huge = b'{"model": "tiny", "prompt": "' + b"a" * (17 * 2**20) + b'"}'
        assert client.post("/v1/completions", content=huge).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(40):
                yield b" " * 2**20

        with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):  # it hung up on us
            assert client.post("/v1/completions", content=pieces()).status_code == 413
        deep = client.post("/v1/completions", content=b'{"prompt": ' + b"[" * 200_000)
        assert deep.status_code == 400 and "Traceback" not in deep.text
        assert write(client).status_code == 200


def test_slow_clients_and_no_http(server: Server, figure: Any) -> None:
    slow = []
    for n in range(100):
        connection = socket.create_connection(address(server), timeout=10)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head[: 20 + n] if n % 2 else head + b"Content-Length: 1000\r\n\r\n{")
        slow.append(connection)
    for seed in range(50):
        with socket.create_connection(address(server), timeout=10) as connection:
            connection.sendall(random.Random(seed).randbytes(400) + b"\r\n\r\n")
    with server.client() as client:
        begin = time.monotonic()
        assert write(client).status_code == 200 and client.get("/healthz").status_code == 200
        taken = time.monotonic() - begin
        for connection in slow[::3]:
            connection.sendall(b"x")
            connection.close()
        assert write(client).status_code == 200
        slowest = slow[1 if len(slow) % 3 else 2]
        slowest.close()
        waiting = next(c for n, c in enumerate(slow) if n % 2 == 0 and n % 3)
        waiting.settimeout(60)
        assert b" 408 " in waiting.recv(200), "a body that does not come is not waited for"
    for connection in slow:
        connection.close()
    figure(f"100 slow clients and 50 that speak no HTTP: others answered in {taken:.2f} s")
    assert server.process.poll() is None


def test_every_request_left_one_line_and_no_traceback(server: Server) -> None:
    log = server.log.read_text(encoding="utf-8")
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:2000]
    requests = [record for record in server.records() if record.get("event") == "request"]
    assert len(requests) >= ASKED and json.dumps(requests).isascii()
    assert server.end() == 0, "it still ends in order"
