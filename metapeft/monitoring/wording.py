"""A report for people: a table of the watches, and the alerts in sentences."""

from __future__ import annotations

from typing import Any

from metapeft.monitoring.channels import text
from metapeft.monitoring.monitor import Report

UNITS = {
    "regret": "score",
    "order": "share wrong",
    "intervals": "share outside",
    "chances": "ECE",
    "profiles": "PSI",
    "remeasured": "share wrong",
    "seconds": "log2 ratio",
    "feedback": "share right",
    "serving": "share failing",
}


def title(report: Report) -> str:
    which = f"meta-model {report.model}" if report.model else "the meta-model that ships"
    followed = f"{report.joined} followed by trials, {report.compared} of them comparable"
    return f"{report.decisions} recommendations by {which}, {followed}"


def rows(report: Report) -> list[dict[str, Any]]:
    """One per watch."""
    return [
        {
            "watch": watch["watch"],
            "in": UNITS[watch["watch"].partition(":")[0]],
            "now": _number(watch["value"]),
            "promised": _number(watch["expected"]),
            "evidence": "" if watch["evidence"] is None else f"{watch['evidence']:.0%} of an alert",
            "seen": watch["decisions"] or "",
            "": "ALERT" if watch["fires"] else watch["known"] or "as promised",
        }
        for watch in report.watches
    ]


def lines(report: Report) -> list[str]:
    """Alerts, and what could not be said."""
    found = []
    for alert in report.alerts:
        found += ["", *text(alert.to_json(), False).removeprefix("metapeft: ").splitlines()]
    if report.alerts and not report.new:
        found += ["", "(told before)"]
    found += [f"over: {key}" for key in report.over]
    found += [f"{channel}: {what}" for channel, what in report.undelivered.items()]
    return found or ["no alert"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
