"""What the last run of the monitor found, for Prometheus: on every server's /metrics, and as a file for the textfile
collector of node_exporter where no server runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector as Base

from metapeft.errors import UserError
from metapeft.monitoring import state


class Collector(Base):
    """Reads the monitor's state whenever it is asked."""

    def collect(self) -> Iterator[Any]:
        report = state.read().report
        if report:
            yield from families(report)

    def describe(self) -> Iterator[Any]:
        return iter(())  # its names are known only when a run has been


def families(report: dict[str, Any]) -> Iterator[Any]:
    """report: `Report.to_json()`."""
    at = datetime.fromisoformat(report["at"]).timestamp()
    yield GaugeMetricFamily("metapeft_monitor_timestamp_seconds", "When `metapeft monitor` last ran", value=at)
    yield GaugeMetricFamily("metapeft_monitor_healthy", "1: no alert", value=float(report["healthy"]))
    for name, about in (
        ("decisions", "Recommendations of the present meta-model"),
        ("joined", "of them followed by trials"),
        ("compared", "of them with two configurations measured or more: their regret is known"),
    ):
        yield GaugeMetricFamily(f"metapeft_monitor_{name}", about, value=report[name])
    labelled = {
        name: GaugeMetricFamily(f"metapeft_monitor_{name}", about, labels=["watch"])
        for name, about in (
            ("value", "Over the last window, in the watch's own unit"),
            ("expected", "What was promised"),
            ("evidence", "Test statistic over its limit: 1 is an alert"),
            ("firing", "1: an alert"),
        )
    }
    for watch in report["watches"]:
        for name in ("value", "expected", "evidence"):
            if watch[name] is not None:
                labelled[name].add_metric([watch["watch"]], watch[name])
        labelled["firing"].add_metric([watch["watch"]], float(watch["fires"]))
    yield from labelled.values()
    gains = [alert["benefit"]["gain"] for alert in report["alerts"] if alert["benefit"]]
    if gains:
        yield GaugeMetricFamily(
            "metapeft_monitor_benefit", "Expected gain of fitting the meta-model anew, in score", value=max(gains)
        )


def write(report: dict[str, Any], path: Path) -> None:
    """A file as node_exporter's textfile collector reads it. Raises UserError when it cannot be written."""

    class Once(Base):
        def collect(self) -> Iterator[Any]:
            return families(report)

    registry = CollectorRegistry()
    registry.register(Once())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(generate_latest(registry))
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}); give a place you may write to") from error
