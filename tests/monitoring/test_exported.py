"""What the monitor exports, and that rules and dashboard use nothing that is not exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from metapeft.monitoring import exported, state
from metapeft.monitoring.state import State
from metapeft.serving.engine import Counts
from metapeft.serving.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
REPORT: dict[str, Any] = {
    "at": "2026-01-01T00:00:00+00:00",
    "healthy": False,
    "decisions": 100,
    "joined": 60,
    "compared": 40,
    "watches": [
        {"watch": "regret", "value": 0.05, "expected": 0.03, "evidence": 1.2, "fires": True},
        {"watch": "profiles", "value": None, "expected": None, "evidence": None, "fires": False},
    ],
    "alerts": [{"benefit": {"gain": 0.02}}],
}
OURS = re.compile(r"\bmetapeft_[a-z0-9_]+")
OTHERS = {"up"}


def samples(text: str) -> dict[str, set[str]]:
    """Name of every sample -> its labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture
def names() -> dict[str, set[str]]:
    """All that a server exports once everything has happened that it counts."""
    state.write(State(report=REPORT))
    engine = SimpleNamespace(
        counts=Counts(), waiting=0, flying=0, held=(), resident_bytes=0, alive=True, name="backbone"
    )
    metrics = Metrics(engine, SimpleNamespace(models=()))  # type: ignore[arg-type]
    metrics.requests.labels("/v1/classify", "200").inc()
    metrics.seconds.labels("/v1/classify").observe(0.1)
    metrics.first.observe(0.1)
    metrics.tokens.labels("m").inc()
    metrics.deployments.labels("refused").inc()
    metrics.feedback.labels("m@1", "right").inc()
    return samples(metrics.text().decode())


def expressions() -> list[str]:
    rules = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "metapeft.json").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return found + [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_rules_and_dashboard_use_what_is_exported(names: dict[str, set[str]]) -> None:
    used = {name for expression in expressions() for name in OURS.findall(expression)}
    assert len(used) > 15
    assert used - set(names) == set()


def test_labels_in_selectors_exist(names: dict[str, set[str]]) -> None:
    for expression in expressions():
        for name, selector in re.findall(r"(metapeft_[a-z0-9_]+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= names[name] | {"instance", "job"}, expression


def test_a_monitor_that_never_ran_exports_nothing_and_breaks_nothing() -> None:
    assert list(exported.Collector().collect()) == []


def test_the_text_file_is_whole(tmp_path: Path) -> None:
    exported.write(REPORT, tmp_path / "metapeft.prom")
    found = samples((tmp_path / "metapeft.prom").read_text())
    assert found["metapeft_monitor_firing"] == {"watch"} and "metapeft_monitor_benefit" in found
    assert [path.name for path in tmp_path.iterdir()] == ["metapeft.prom"]


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("promtool", ["check", "rules", "prometheus/rules.yml"]),
        ("promtool", ["check", "config", "--syntax-only", "prometheus/prometheus.yml"]),
        ("amtool", ["check-config", "alertmanager/alertmanager.yml"]),
    ],
)
def test_their_own_tools_accept_the_files(tool: str, arguments: list[str]) -> None:
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed; Debian: apt-get install prometheus prometheus-alertmanager")
    done = subprocess.run([program, *arguments], cwd=DOCKER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_fire_when_they_should(tmp_path: Path) -> None:
    """Prometheus' own evaluation of the rules on made-up series."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed; Debian: apt-get install prometheus")
    series = [
        ('metapeft_monitor_firing{instance="s",watch="regret"}', "0x5 1x30"),
        ('metapeft_monitor_firing{instance="s",watch="feedback:m@1"}', "0x5 1x30"),
        ('metapeft_http_requests_total{instance="s",route="/v1/classify",status="200"}', "0+50x35"),
        ('metapeft_http_requests_total{instance="s",route="/v1/classify",status="500"}', "0+5x35"),
        ('metapeft_http_requests_total{instance="t",route="/readyz",status="503"}', "0+50x35"),  # it is starting
        ('up{job="metapeft",instance="s"}', "1x20 0x15"),
    ]
    firing = {
        "MetapeftAdviceDegraded": {"severity": "critical", "instance": "s", "watch": "regret"},
        "MetapeftAdapterDegraded": {"severity": "critical", "instance": "s", "watch": "feedback:m@1"},
        "MetapeftErrors": {"severity": "critical", "instance": "s"},
        "MetapeftDown": {"severity": "critical", "instance": "s", "job": "metapeft"},
    }
    silent = ("MetapeftEngineDead", "MetapeftFull", "MetapeftMonitorSilent")
    # promtool compares annotations too: rules without them say when they fire.
    rules = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    cases = [
        {"eval_time": "30m", "alertname": name, "exp_alerts": [{"exp_labels": labels}]}
        for name, labels in firing.items()
    ]
    cases += [{"eval_time": "30m", "alertname": name, "exp_alerts": []} for name in silent]
    cases += [{"eval_time": "4m", "alertname": "MetapeftAdviceDegraded", "exp_alerts": []}]
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series],
                "alert_rule_test": cases,
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run([program, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
