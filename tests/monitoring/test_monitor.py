"""From decisions on disk to an alert that arrives once, and to its end after retraining."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

import metapeft
from metapeft.errors import UserError
from metapeft.meta import versions
from metapeft.monitoring import benefit, channels, drift, exported, feedback, shadow, state, watches
from metapeft.monitoring.alerts import Alert
from metapeft.monitoring.monitor import monitor
from metapeft.monitoring.outcomes import Decision, Kind, joined
from metapeft.monitoring.promise import Promise
from metapeft.monitoring.watches import Limits
from metapeft.settings import load_settings
from tests.monitoring import made

HEALTHY, BROKEN = 40, 50


@pytest.fixture(scope="module")
def history() -> list[Any]:
    """Decisions of the champion, and after HEALTHY of them those of a model that believes in no difference."""
    return [*made.steps(HEALTHY), *made.steps(BROKEN, broken=True, start=HEALTHY)]


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    arrived: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(channels.URL, f"http://127.0.0.1:{server.server_port}/")
    yield arrived
    server.shutdown()
    server.server_close()


def test_a_degradation_is_told_once_and_is_over_after_retraining(
    history: list[Any], messages: list[dict[str, Any]]
) -> None:
    settings = load_settings()
    made.settle()
    made.live(history[:HEALTHY])
    calm = monitor(settings)
    assert calm.healthy and calm.decisions == calm.joined == calm.compared == HEALTHY and messages == []
    assert {w["watch"] for w in calm.watches if not w["known"]} >= {"regret", "order", "intervals", "profiles"}

    made.live(history[HEALTHY:])
    found = monitor(settings, estimate=False)
    keys = {alert.key for alert in found.alerts}
    assert keys & {"regret", "order"} and found.retrain and set(found.new) == keys
    (alert, *_) = [a for a in found.alerts if a.key in ("regret", "order")]
    assert alert.since >= history[HEALTHY - 15].entry["at"], "the change is placed about where it was"
    assert alert.kinds and alert.chance is not None and alert.chance < 0.5 and "grow_and_retrain" in alert.do
    assert sorted(m["alert"]["key"] for m in messages) == sorted(keys)
    gauges = {family.name: family for family in exported.Collector().collect()}
    assert gauges["metapeft_monitor_healthy"].samples[0].value == 0

    again = monitor(settings, estimate=False, retrains="one")
    assert {a.key for a in again.alerts} == keys and again.new == ()
    assert again.retrain, "whoever looks does not take it from whoever retrains"
    assert monitor(settings, estimate=False, retrains="one").due == again.due, "a retry is told the same"
    assert not monitor(settings, estimate=False).retrain and not monitor(settings, estimate=False, retrains="two").due
    assert len(messages) == len(keys), "told once"

    new = versions._add(replace(versions.champion(), number=0))
    versions.promote(new.number)
    over = monitor(settings, estimate=False)
    assert over.healthy and set(over.over) == keys and over.decisions == 0, "another model, other decisions"
    assert [m["status"] for m in messages].count("resolved") == len(keys)
    assert monitor(settings, estimate=False).over == () and len(messages) == 2 * len(keys)


def test_killed_while_telling_the_next_run_still_asks_for_retraining(
    history: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings()
    made.settle()
    made.live(history)

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            monitor(settings, estimate=False, retrains="one")
    found = monitor(settings, estimate=False, retrains="two")
    assert found.alerts and found.new == () and found.retrain, "it is known, and nobody retrains for it"
    assert not monitor(settings, estimate=False).retrain


def test_the_command_prints_json_and_ends_with_3_where_asked(history: list[Any]) -> None:
    made.settle()
    made.live(history)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "metapeft.cli", "monitor", "--quick", *more]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--json", "--dry-run", "--exit-code")
    report = json.loads(done.stdout)
    assert done.returncode == 3 and not report["healthy"] and not report["retrain"], "a dry run has told nothing"
    done = run()
    assert done.returncode == 0, done.stderr
    assert "ALERT" in done.stdout and "What to do" in done.stdout and "metapeft: " in done.stderr


def test_nothing_known_is_no_alert() -> None:
    found = metapeft.monitor(estimate=False)
    assert found.healthy and found.decisions == 0 and all(not w["fires"] for w in found.watches)
    assert all(w["known"] for w in found.watches)


def test_where_the_registry_is_away_everything_else_is_still_looked_at(
    history: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made.settle()
    made.live(history)
    feedback.record("task-a@1", "wrong")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://nobody@127.0.0.1:1/none")
    remembered = state.State()
    known = Alert("feedback:task-a@1", "critical", "It fails", "It failed.", "roll back.", "then", 0.1, 0.9, None)
    state.compare(remembered, [known], "then")
    state.write(remembered)
    found = metapeft.monitor(estimate=False)
    (asked,) = [w for w in found.watches if w["watch"] == "feedback"]
    assert "could not be asked" in asked["known"]
    assert len(found.alerts) > 1 and known.key in [a.key for a in found.alerts] and found.over == ()


def test_a_dry_run_trains_nothing() -> None:
    with pytest.raises(UserError, match="leave out --shadow or --dry-run"):
        metapeft.monitor(shadow=3, tell=False)


def test_without_a_change_nothing_fires_and_a_stronger_one_fires_sooner() -> None:
    """The watches alone, on regrets drawn from the promise and on ones that are larger."""
    promise: Promise = made.promise()
    # What is promised here is of a model that has seen all families, and a little too good: some histories do alarm.
    # benchmarks/monitoring.py counts false alarms.
    entries = made.steps(120, start=1220)
    decisions = joined([s.entry for s in entries], [t for s in entries for t in s.trials])
    limits = Limits(promise, decisions)
    assert all(not f.alarms for f in watches.watch(decisions, promise, limits))
    delays = []
    for more in (0.06, 0.12, 0.24):
        worse = [d if i < 40 else replace(d, regret=(d.regret or 0) + more) for i, d in enumerate(decisions)]
        regret = next(f for f in watches.watch(worse, promise, limits) if f.watch == "regret")
        assert regret.fired is not None and regret.fired >= 40 and regret.since is not None
        delays.append(regret.fired - 40)
    assert delays == sorted(delays, reverse=True) and delays[-1] <= 10


def test_a_promise_that_was_a_little_too_good_is_told_once_and_a_real_change_still_is() -> None:
    promise = made.promise()
    level = float(np.mean(promise.of(Kind(8)).regret)) + 0.02
    values = np.clip(level + 0.05 * np.random.default_rng(1).standard_normal(3000), 0, promise.cap)

    def decision(regret: float) -> Any:
        return Decision("", "", "t", "v", "", "f", 0, Kind(8), regret=regret)

    limits = Limits(promise, [decision(v) for v in values])

    def alarms(given: Any) -> tuple[int, ...]:
        found = watches.watch([decision(v) for v in given], promise, limits)
        return next(f.alarms for f in found if f.watch == "regret")

    assert 1 <= len(alarms(values)) <= 3, "by the promise alone it would be a dozen"
    assert any(3000 <= a < 3030 for a in alarms([*values, *(values[:200] + 0.08)]))


def test_where_only_the_first_choice_is_ever_tried_its_interval_is_watched() -> None:
    """No sweep, no shadow trial: regret stays unknown, and says nothing."""
    entries = [replace_trials(s, 1) for s in made.steps(60, start=1500)]
    decisions = joined([s.entry for s in entries], [t for s in entries for t in s.trials])
    promise = made.promise()
    outside = [d if i < 20 else replace(d, outside=1.0) for i, d in enumerate(decisions)]
    for given, fires in ((decisions, False), (outside, True)):
        found = {f.watch: f for f in watches.watch(given, promise, Limits(promise, given))}
        assert found["regret"].decisions == found["order"].decisions == found["chances"].decisions == 0
        assert found["intervals"].decisions == 60 and (found["intervals"].fired is not None) is fires


def test_seconds_of_another_machine_are_noticed() -> None:
    entries = made.steps(60, start=900)
    decisions = joined([s.entry for s in entries], [t for s in entries for t in s.trials])
    promise = made.promise()
    limits = Limits(promise, decisions)
    slower = [d if i < 40 else replace(d, slowness=(d.slowness or 0) + 1.0) for i, d in enumerate(decisions)]
    calm, late = (
        next(f for f in watches.watch(given, promise, limits) if f.watch == "seconds") for given in (decisions, slower)
    )
    assert calm.fired is None and late.fired is not None and 40 <= late.fired < 55


def test_the_benefit_of_retraining_is_what_a_refit_would_have_chosen(history: list[Any]) -> None:
    """A model that believes in no difference is told how much a good one gains; a good one, that it gains nothing."""
    found, model = made.made()
    worse, fine = history[HEALTHY:], history[:HEALTHY]
    gains = []
    for steps in (worse, fine):
        observations = made.Selector(model, found.observations(), found).learned(steps)
        decisions = joined([s.entry for s in steps], [t for s in steps for t in s.trials])
        first = benefit.first_choices([s.entry for s in steps])
        gains.append(benefit.benefit(decisions, observations, first, fitted=lambda known: model))
    bad, good = gains
    assert bad.tasks == BROKEN and bad.gain > 2 * bad.error > 0
    assert abs(good.gain) < 3 * good.error + 0.01 and "left out" in bad.said()
    assert benefit.benefit([], found.observations(), {}).tasks == 0


def test_shadow_trials_are_due_where_only_the_first_was_tried() -> None:
    entries = made.steps(3, start=1200)
    first_only = [replace_trials(s, 1) for s in entries]
    given = [s.entry for s in first_only]
    due = shadow.due(given, [t for s in first_only for t in s.trials])
    assert [entry["id"] for entry, _ in due] == [s.entry["id"] for s in reversed(first_only)]
    assert shadow.due(given, [t for s in entries for t in s.trials]) == []
    one = first_only[0]
    second = one.entry["recommendations"][1]["configuration"]
    failed = replace(one.trials[0], id="failed", status="diverged", score=None, configuration=second)
    assert shadow.due([one.entry], [*one.trials, failed]) == [], "it would end in the same way again"
    later = one.entry | {"id": "later", "at": "2999-01-01T00:00:00+00:00"}
    credited = replace(failed, id="credited", status="ok", started="2999-01-02T00:00:00+00:00")
    assert shadow.due([one.entry, later], [*one.trials, credited]) == [], "wherever it counts"


def replace_trials(step: Any, count: int) -> Any:
    return replace(step, trials=step.trials[:count])


def test_profiles_of_the_experience_do_not_drift_from_themselves() -> None:
    found, _ = made.made()
    rows = np.array([drift.scaled(f) for f in found.features.values()])
    known = drift.Profiles(rows, tuple(o for o, _ in found.features))
    calm, _ = drift.watch(known, rows[::-1], range(len(rows)), 0.8)
    assert calm.fired is None
