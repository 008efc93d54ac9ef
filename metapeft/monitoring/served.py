"""What running servers count about themselves: errors and latency since the last look."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from metapeft.tracking import servers

SECONDS = 5.0
ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/classify")
ERRORS = 0.01  # share of requests that may fail
SLOW_SECONDS, SLOW = 30.0, 0.05  # one answer in twenty may take longer
RARE = 1e-4  # chance of as many, at these rates, below which it is no chance any more

Counts = dict[str, float]
Ours = Literal["", "key", "address"]


@dataclass(frozen=True)
class Health:
    """Of one server, or of all: since the last look. chance: of so many errors (slow answers) at the rates allowed.
    killed: the note of a server whose process is gone and did not take it back. ours: what is wrong here rather than
    with the server, if it was not reached."""

    server: str
    requests: int
    errors: int
    answers: int
    slow: int
    error_chance: float
    slow_chance: float
    reached: bool = True
    ours: Ours = ""
    killed: str = ""

    @property
    def failing(self) -> bool:
        return not self.reached or self.error_chance < RARE

    @property
    def slowed(self) -> bool:
        return self.slow_chance < RARE


def look(before: Mapping[str, Counts]) -> tuple[list[Health], dict[str, Counts]]:
    """Every server that is listed in METAPEFT_HOME or named by METAPEFT_SERVER; what to give as `before` next time."""
    found, now = [], {}
    for url, token in servers.known():
        try:
            counts = counted(_get(f"{url}/metrics", token))
        except (OSError, ValueError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403)
            no_address = not url.startswith(("http://", "https://"))
            ours: Ours = "key" if refused else "address" if no_address else ""
            found.append(Health(url, 0, 0, 0, 0, 1.0, 1.0, reached=False, ours=ours))
            continue
        now[url] = counts
        found.append(since(url, before.get(url, {}), counts))
    silent = {url: str(note) for url, note in servers.gone()}
    found += [Health(url, 0, 0, 0, 0, 1.0, 1.0, reached=False, killed=note) for url, note in silent.items()]
    return found, now


def since(server: str, before: Mapping[str, float], counts: Counts) -> Health:
    """The difference of two looks; a server that started anew counts from zero."""
    fresh = any(counts.get(name, 0) < value for name, value in before.items())
    new = {name: int(value - (0 if fresh else before.get(name, 0))) for name, value in counts.items()}
    return Health(
        server=server,
        requests=new["requests"],
        errors=new["errors"],
        answers=new["answers"],
        slow=new["slow"],
        error_chance=tail(new["errors"], new["requests"], ERRORS),
        slow_chance=tail(new["slow"], new["answers"], SLOW),
    )


def counted(text: str) -> Counts:
    """Totals of what a server's /metrics says. slow: answers that took longer than SLOW_SECONDS."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Counts = {"requests": 0.0, "errors": 0.0, "answers": 0.0, "slow": 0.0}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if not labels.get("route", "").startswith("/v1/"):
                continue  # probes and scrapes: they fail while a server starts, and hide failures in their number
            if name == "metapeft_http_requests_total":
                found["requests"] += value
                found["errors"] += value if labels.get("status", "").startswith("5") else 0
            elif labels.get("route") in ANSWERS:
                if name == "metapeft_http_request_seconds_count":
                    found["answers"] += value
                    found["slow"] += value
                elif name == "metapeft_http_request_seconds_bucket" and float(labels["le"]) == SLOW_SECONDS:
                    found["slow"] -= value
    return found


def tail(hits: int, of: int, rate: float) -> float:
    """P(at least so many) of a binomial."""
    if hits <= 0:
        return 1.0
    total = 0.0
    for k in range(hits):  # the lower tail: hits are few
        total += math.exp(_log_choose(of, k) + k * math.log(rate) + (of - k) * math.log1p(-rate))
    return max(0.0, 1.0 - total)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _get(url: str, token: str) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=SECONDS) as answer:
        text: str = answer.read().decode()
        return text


def summed(found: list[Health]) -> dict[str, Any]:
    """For the report: all servers together."""
    return {
        "servers": len(found),
        "unreachable": sum(not h.reached for h in found),
        "requests": sum(h.requests for h in found),
        "errors": sum(h.errors for h in found),
        "answers": sum(h.answers for h in found),
        "slow": sum(h.slow for h in found),
    }
