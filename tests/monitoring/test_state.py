"""Each alert is said once by each channel, what failed is tried again, and the end is said once."""

from __future__ import annotations

import multiprocessing
from typing import Any

from metapeft.monitoring import state
from metapeft.monitoring.alerts import Alert
from metapeft.monitoring.state import State, compare, tell


def alert(key: str = "regret") -> Alert:
    return Alert(key, "critical", "title", "text", "do", "", 0.1, 0.0, 0.01)


class Channel:
    """Remembers what it said; `works` decides whether it arrives."""

    def __init__(self, works: bool = True, repeats: bool = False):
        self.works, self.repeats, self.said = works, repeats, list[tuple[str, bool]]()

    def __call__(self, alert: dict[str, Any], at: str, over: bool) -> bool:
        if self.works:
            self.said.append((alert["key"], over))
        return self.works


def run(found: list[Alert], channels: dict[str, Channel]) -> tuple[state.Changes, dict[str, str]]:
    """One run of the monitor, from file to file."""
    known = state.read()
    changes = compare(known, found, "2026-01-01T00:00:00+00:00")
    owed = tell(known, channels)
    state.write(known)
    return changes, owed


def test_once_and_over_once() -> None:
    channel, steady = Channel(), Channel(repeats=True)
    both = {"webhook": channel, "alertmanager": steady}
    for _ in range(3):
        changes, _ = run([alert()], both)
    assert changes.new == () and changes.over == ()
    for _ in range(2):
        run([], both)
    assert channel.said == [("regret", False), ("regret", True)]
    assert steady.said == [("regret", False)] * 3 + [("regret", True)], "Alertmanager wants to hear it again"
    assert state.read().over == {}
    assert run([alert()], both)[0].new == ("regret",), "another time"
    assert len(channel.said) == 3


def test_what_did_not_arrive_is_tried_again_and_nobody_hears_of_the_end_of_what_he_never_heard() -> None:
    good, bad = Channel(), Channel(works=False)
    both = {"log": good, "webhook": bad}
    _, owed = run([alert(), alert("profiles")], both)
    assert "2 not delivered" in owed["webhook"]
    run([alert()], both)
    bad.works = True
    _, owed = run([alert()], both)
    assert owed == {} and bad.said == [("regret", False)]
    assert good.said == [("regret", False), ("profiles", False), ("profiles", True)]


def test_a_damaged_state_starts_anew() -> None:
    state.write(State())
    for text in ("{", '{"schema": 99}', '{"schema": 1, "alerts": {"regret": {"x": 1}}, "over": {}}', "[]"):
        state.path().write_text(text)
        assert state.read() == State()


def hold(ready: Any, go: Any) -> None:
    with state.alone():
        ready.set()
        go.wait(30)


def test_one_run_at_a_time() -> None:
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(ready, go))
    other.start()
    try:
        assert ready.wait(60)
        from filelock import FileLock, Timeout

        try:
            with FileLock(state.path().parent / "monitor.lock", timeout=0.2):
                raise AssertionError("two at once")
        except Timeout:
            pass
    finally:
        go.set()
        other.join(30)
    with state.alone():
        pass
