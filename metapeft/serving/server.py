"""`metapeft serve`: puts the parts together, listens, and ends in order.

On SIGTERM or SIGINT the server stops to listen, finishes what it has accepted, and ends; a second signal ends it at
once. Nothing that matters is only in memory: after a kill the next start serves the same, and measurements that were
interrupted start again when they are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from metapeft import backbones
from metapeft.errors import UserError
from metapeft.progress import say
from metapeft.runtime import describe
from metapeft.serving.app import Bounds, Service, create_app
from metapeft.serving.engine import Engine, Limits
from metapeft.serving.keys import Keyring
from metapeft.serving.metrics import Metrics
from metapeft.serving.registry import Deployment, Registry
from metapeft.serving.select import Selector
from metapeft.settings import Settings
from metapeft.tracking import servers

LOCAL = ("127.0.0.1", "localhost", "::1")
GRACE_SECONDS = 30
HEAD_SECONDS = 30.0  # until the whole head of a request is here; bodies have a bound of their own (`Bounds`)
HEAD_BYTES = 64 * 1024
CONNECTIONS = 2000


def serve(
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    bounds: Bounds | None = None,
    poll_seconds: float = 60.0,
    params: Path | None = None,
) -> None:
    """Serve until a signal comes. port 0: any that is free. Raises UserError before anything is loaded where it can."""
    local = host in LOCAL
    keyring = Keyring()
    if not local and not keyring.any:
        raise UserError(
            f"host {host} can be reached from other machines and there is no key; "
            "create one first: metapeft keys create NAME"
        )
    with contextlib.closing(_listen(host, port)) as listener:
        address = listener.getsockname()
        url = url_of(host, address[1])
        engine = Engine(backbones.load(settings.backbone), limits)
        registry = Registry(engine, settings, poll_seconds)
        selector = Selector(settings.backbone, params)
        metrics = Metrics(engine, registry)

        def deployed(done: Deployment) -> None:
            metrics.deployed(done)
            log({"event": "deployment", **asdict(done)})

        registry.on_deployment = deployed
        service = Service(engine, registry, selector, keyring, metrics, log, local, bounds=bounds or Bounds())
        server = uvicorn.Server(configured(create_app(service)))
        with _running(engine, registry, selector), servers.listed(url, service.token):
            say(f"serving {settings.backbone} on {describe()['device']} at {url}")
            for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn, having ended in order, raises them once more
                signal.signal(number, lambda *_: None)
            server.run(sockets=[listener])


class Connection(H11Protocol):
    """uvicorn's, which waits for ever for a request that does not come, and takes every connection there is."""

    patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        assert self.limit_concurrency is not None  # beyond it requests get 503; far beyond it nobody is listened to
        if len(self.connections) > self.limit_concurrency * 7 // 6:
            transport.abort()
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.patience is not None:
            self.patience.cancel()

    def _wait(self) -> None:
        """For the head of the next request, however often a piece of it comes."""
        if self.patience is not None:
            self.patience.cancel()
        self.patience = self.loop.call_later(HEAD_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def configured(app: Any) -> uvicorn.Config:
    """How it is listened to. h11 bounds the head of a request; httptools, which uvicorn prefers, does not."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        limit_concurrency=CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, files * 3 // 4),
        backlog=1024,
        h11_max_incomplete_event_size=HEAD_BYTES,
        server_header=False,
    )


@contextlib.contextmanager
def _running(engine: Engine, registry: Registry, selector: Selector) -> Iterator[None]:
    for part in (engine, registry, selector):
        part.start()
    try:
        yield
    finally:
        selector.stop()
        registry.stop()
        engine.stop()


def url_of(host: str, port: int) -> str:
    """Where programs on this machine reach what listens on `host`."""
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}); choose another --port") from error


def log(record: dict[str, Any]) -> None:
    """One line of JSON; never a prompt, an answer or a key."""
    record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
    say(json.dumps(record))
