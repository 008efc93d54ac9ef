"""What the monitor remembers between runs: METAPEFT_HOME/monitoring/state.json, replaced as a whole.

An alert is said once by each channel; one that a channel could not deliver is tried again at the next run; that it is
over is said once too. A run that is killed between saying and remembering says it a second time: better than never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metapeft.errors import MetapeftError, UserError
from metapeft.monitoring.alerts import Alert
from metapeft.profiling import cache
from metapeft.settings import home

SCHEMA = 1


@dataclass
class Open:
    """An alert that was raised, or is over since `at`. told: names of channels. heard: of one that is over, the
    channels that had said it. taken: by whom, to retrain for it."""

    alert: dict[str, Any]
    at: str
    told: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    taken: str = ""


@dataclass
class State:
    """servers: their counters at the last look. report: what the last run found. remeasured: when a task's profile was
    measured again and was as kept."""

    alerts: dict[str, Open] = field(default_factory=dict)
    over: dict[str, Open] = field(default_factory=dict)  # resolved, and not yet told everywhere
    servers: dict[str, dict[str, float]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    remeasured: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "alerts": {key: vars(alert) for key, alert in self.alerts.items()},
            "over": {key: vars(alert) for key, alert in self.over.items()},
            "servers": self.servers,
            "report": self.report,
            "remeasured": self.remeasured,
        }


def path() -> Path:
    return home() / "monitoring" / "state.json"


def read() -> State:
    """An empty one where there is none, or where it is damaged or of another version."""
    record = cache.read(path())
    try:
        if record is None or record["schema"] != SCHEMA:
            return State()
        opened, over = ({k: _open(v) for k, v in record[name].items()} for name in ("alerts", "over"))
        again = {str(place): str(at) for place, at in record.get("remeasured", {}).items()}
        return State(opened, over, dict(record["servers"]), dict(record["report"]), again)
    except (KeyError, TypeError, AttributeError, ValueError):
        return State()


def _open(record: dict[str, Any]) -> Open:
    """`asked` is of earlier versions, which did not know who retrains."""
    taken = "somebody" if record.get("asked") else ""
    return Open(**{"taken": taken, **{name: value for name, value in record.items() if name != "asked"}})


def write(state: State) -> None:
    """Raises UserError when METAPEFT_HOME cannot be written."""
    cache.write(path(), state.to_json())


@contextmanager
def alone() -> Iterator[None]:
    """One run at a time. Raises MetapeftError when another one holds it for long."""
    from filelock import FileLock, Timeout

    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path().parent / "monitor.lock", timeout=60)
        lock.acquire()
    except Timeout as error:
        raise MetapeftError("another `metapeft monitor` is at work here; try again when it has ended") from error
    except OSError as error:
        raise UserError(
            f"cannot write in {path().parent} ({error.strerror}); set METAPEFT_HOME to a folder you may write in"
        ) from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Changes:
    """Keys of alerts: new in this run, and over."""

    new: tuple[str, ...]
    over: tuple[str, ...]


def compare(state: State, alerts: Sequence[Alert], now: str) -> Changes:
    """Take the alerts of this run into the state."""
    found = {alert.key: alert for alert in alerts}
    new = tuple(key for key in found if key not in state.alerts)
    over = tuple(key for key in state.alerts if key not in found)
    for key in over:
        gone = state.alerts.pop(key)
        state.over[key] = Open(gone.alert, now, [], gone.told)
    for key, alert in found.items():
        earlier = state.alerts.get(key)
        state.over.pop(key, None)
        state.alerts[key] = replace(earlier, alert=alert.to_json()) if earlier else Open(alert.to_json(), now)
    return Changes(new, over)


def tell(state: State, channels: Mapping[str, Callable[[dict[str, Any], str, bool], bool]]) -> dict[str, str]:
    """Say what has not been said, by every channel: `channel(alert, since when it is known, whether it is over)` gives
    whether it arrived. Returns the channels that failed, with how many messages they owe."""
    owed: dict[str, int] = {}
    for over, alerts in ((False, state.alerts), (True, state.over)):
        for key, known in list(alerts.items()):
            for name, send in channels.items():
                repeated = getattr(send, "repeats", False) and not over
                if (name in known.told and not repeated) or (over and name not in known.heard):
                    continue
                if send(known.alert, known.at, over):
                    known.told = sorted({*known.told, name})
                else:
                    owed[name] = owed.get(name, 0) + 1
            if over and set(channels) & set(known.heard) <= set(known.told):
                del alerts[key]
    return {name: f"{count} not delivered; tried again at the next run" for name, count in owed.items()}
