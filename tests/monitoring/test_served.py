"""What servers count, and what of it is no chance any more."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from scipy.stats import binom

from metapeft.monitoring import served
from metapeft.monitoring.alerts import of_server
from metapeft.serving.metrics import SECONDS
from metapeft.tracking import servers
from tests.tracking.test_servers import killed


def text(answers: dict[str, int], seconds: list[float]) -> str:
    registry = CollectorRegistry()
    requests = Counter("metapeft_http_requests", "…", ["route", "status"], registry=registry)
    latency = Histogram("metapeft_http_request_seconds", "…", ["route"], buckets=SECONDS, registry=registry)
    requests.labels("/readyz", "503").inc(94)  # it was starting
    requests.labels("/healthz", "200").inc(5000)
    for status, count in answers.items():
        requests.labels("/v1/classify", status).inc(count)
    for value in seconds:
        latency.labels("/v1/classify").observe(value)
        latency.labels("/metrics").observe(99.0)  # nobody's answer
    return generate_latest(registry).decode()


def test_totals_are_read_from_what_prometheus_reads() -> None:
    found = served.counted(text({"200": 90, "503": 4, "429": 6}, [0.2, 40.0, 31.0]))
    assert found == {"requests": 100, "errors": 4, "answers": 3, "slow": 2}


def test_only_what_is_new_counts_and_a_restart_counts_from_zero() -> None:
    before = served.counted(text({"200": 100, "500": 50}, []))
    after = served.counted(text({"200": 400, "500": 50}, []))
    assert not served.since("s", before, after).failing
    assert served.since("s", {}, after).failing
    fresh = served.since("s", after, served.counted(text({"200": 10}, [])))
    assert fresh.requests == 10 and not fresh.failing


@pytest.mark.parametrize(("hits", "of", "rate"), [(0, 10, 0.01), (1, 10, 0.01), (7, 100, 0.05), (30, 1000, 0.01)])
def test_the_tail_is_the_binomials(hits: int, of: int, rate: float) -> None:
    assert served.tail(hits, of, rate) == pytest.approx(binom.sf(hits - 1, of, rate), abs=1e-9)


def test_slow_answers_are_found() -> None:
    slow = served.since("s", {}, served.counted(text({"200": 60}, [0.1] * 40 + [45.0] * 20)))
    assert slow.slowed and not slow.failing


def test_probes_neither_fail_nor_hide_failures() -> None:
    starting = served.since("s", {}, served.counted(text({}, [])))
    assert (starting.requests, starting.failing) == (0, False)
    broken = served.since("s", {}, served.counted(text({"200": 30, "500": 10}, [])))
    assert (broken.requests, broken.errors, broken.failing) == (40, 10, True)


def test_a_killed_server_is_told_until_another_one_serves_there(home: Path) -> None:
    note = killed("http://127.0.0.1:9")
    (found,), _ = served.look({})
    assert found.failing and not found.reached
    (alert,) = of_server(found, "now")
    assert alert.key == "serving:errors:http://127.0.0.1:9" and "killed" in alert.text and str(note) in alert.do
    note.unlink()
    assert served.look({})[0] == []


def test_a_server_that_is_listed_and_silent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_SERVER", "http://127.0.0.1:9")
    (found,), counts = served.look({})
    assert not found.reached and found.failing and counts == {}


class Locked(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_server_that_refuses_the_key_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("METAPEFT_SERVER", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        (found,), _ = served.look({})
    finally:
        server.shutdown()
    (alert,) = of_server(found, "now")
    assert found.ours == "key" and "METAPEFT_SERVER_KEY" in alert.do and "restart" not in alert.do


def test_an_address_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_SERVER", "localhost:8000")
    (found,), _ = served.look({})
    (alert,) = of_server(found, "now")
    assert "no address" in alert.text and alert.do == "correct METAPEFT_SERVER."


def test_a_server_that_is_listed_and_named_counts_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_SERVER", "http://127.0.0.1:9/")
    with servers.listed("http://127.0.0.1:9", "secret"):
        assert len(served.look({})[0]) == 1 and list(servers.known()) == [("http://127.0.0.1:9", "secret")]
