"""What Prometheus reads: requests as they are answered, the engine as it is when it is asked."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from metapeft.monitoring import exported
from metapeft.runtime import mx
from metapeft.serving.registry import OUTCOMES

if TYPE_CHECKING:
    from metapeft.serving.engine import Engine
    from metapeft.serving.registry import Deployment, Registry

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One per server. Routes and models are labels; no text and no key ever is."""

    def __init__(self, engine: Engine, registry: Registry):
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(engine, registry))
        self.registry.register(exported.Collector())
        self.requests = Counter(
            "metapeft_http_requests", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "metapeft_http_request_seconds", "Until the last byte", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "metapeft_first_token_seconds", "Until the first text", buckets=SECONDS, registry=self.registry
        )
        self.tokens = Counter("metapeft_model_tokens", "Tokens written", ["model"], registry=self.registry)
        self.feedback = Counter(
            "metapeft_feedback", "Answers that callers judged", ["model", "verdict"], registry=self.registry
        )
        self.deployments = Counter("metapeft_deployments", "Deployments", ["outcome"], registry=self.registry)
        for outcome in OUTCOMES:  # from zero on: a counter that appears with its first event has not increased
            self.deployments.labels(outcome)

    def deployed(self, deployment: Deployment) -> None:
        self.deployments.labels(deployment.outcome).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    def __init__(self, engine: Engine, registry: Registry):
        self.engine, self.models = engine, registry

    def collect(self) -> Iterator[Any]:
        engine = self.engine
        for name, value in asdict(engine.counts).items():
            yield CounterMetricFamily(f"metapeft_engine_{name}", f"Since the start: {name}", value=value)
        gauges = {
            "waiting": (engine.waiting, "Requests in the queue"),
            "rows": (engine.flying, "Sequences being read or written"),
            "adapters": (len(engine.held), "Adapters in memory"),
            "adapter_bytes": (engine.resident_bytes, "Bytes of the adapters in memory"),
            "mlx_active_bytes": (mx.get_active_memory(), "Bytes that MLX holds in arrays"),
            "mlx_cache_bytes": (mx.get_cache_memory(), "Bytes that MLX keeps for reuse"),
            "peak_resident_bytes": (_peak(), "Largest resident set of the process"),
            "alive": (float(engine.alive), "1 while the engine's thread runs"),
            "models": (len(self.models.models), "Registered versions for this backbone"),
        }
        for name, (number, about) in gauges.items():
            yield GaugeMetricFamily(f"metapeft_engine_{name}", about, value=number)


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
