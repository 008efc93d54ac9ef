"""Are kept profiles still what their tasks measure like?

A profile is measured once and then believed: by every recommendation, and by the next meta-model. Where it was measured
by a process in a wrong state, or with other versions of what it is measured with, nothing that is fitted to it helps.
So now and then a task whose rows are still here is measured again. Measuring is deterministic: what differs is wrong,
the first time, and then every task at hand is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.errors import MetapeftError
from metapeft.meta import decisions as given
from metapeft.monitoring import state
from metapeft.profiling import Profile, profiles
from metapeft.progress import say

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

# Usual spreads of a feature (`profiles.SCALES`). Another engine moves a rounded answer or two of a small sample.
TOLERANCE = 0.25

Find = Callable[[dict[str, Any]], Task | None]


@dataclass(frozen=True)
class Remeasured:
    """moved: the features that differ by more than the tolerance, the most first, in usual spreads; none: as kept.
    made: files that were made of the kept profile."""

    task: Task
    measured: Profile
    moved: dict[str, float]
    at: str
    made: tuple[Path, ...] = ()

    @property
    def place(self) -> str:
        """By which the monitor's state knows it."""
        return f"{self.measured.task_version} {self.measured.backbone}"

    def mend(self) -> None:
        """Keep what was measured now; what was made of the old profile is made again when it is next asked for.

        Raises UserError when METAPEFT_HOME cannot be written.
        """
        if self.moved:
            for path in self.made:
                path.unlink(missing_ok=True)
            profiles.keep(self.measured, self.task)


def run(
    count: int, find: Find, backbone: Callable[[str], Backbone], made: Callable[[str], Iterable[Path]]
) -> list[Remeasured]:
    """Measure `count` tasks of recommendations again, those first that never were; all at hand where one differs.
    Nothing is written.

    find: the task of a decision, None where its rows are no longer here. backbone: loads one by its id. made: files
    that were made of a task's profile, by the task's version.
    """
    load = cache(backbone)
    found: list[Remeasured] = []
    for entry in _due(given.read(), state.read().remeasured):
        if len(found) >= count and not any(each.moved for each in found):
            break
        try:
            task = find(entry)
            before = None if task is None else profiles.kept(task, load(entry["backbone"]).content_id)
            if task is None or before is None:
                continue
            measured = profiles.measure(task, load(entry["backbone"]))
        except MetapeftError as error:
            say(f"the profile of {entry['task']} was not measured again: {error}")
            continue
        moved = differences(_embedded(before), _embedded(measured))
        at = datetime.now(UTC).isoformat(timespec="seconds")
        found.append(Remeasured(task, measured, moved, at, tuple(made(task.version))))
        say(f"the profile of {task.name} was measured again: {said(moved) or 'as before'}")
    return found


def differences(kept: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Features by how far they are from what was kept, in usual spreads (as both are given), the farthest first."""
    far = {name: measured[name] - kept[name] for name in measured if name in kept}
    moved = {name: round(value, 3) for name, value in far.items() if not abs(value) <= TOLERANCE}
    return dict(sorted(moved.items(), key=lambda item: -abs(item[1])))


def _embedded(profile: Profile) -> dict[str, float]:
    return dict(zip(profile.names, profile.embedding, strict=True))


def said(moved: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {shift:+.1f}" for name, shift in list(moved.items())[:3])


def _due(entries: Sequence[dict[str, Any]], before: Mapping[str, str]) -> list[dict[str, Any]]:
    """The last decision about each task: of those never measured again first, the latest of them; then of those that
    were, the longest ago first."""
    last = {f"{entry['task_version']} {entry['backbone']}": entry for entry in entries}
    places = sorted(last, key=lambda place: last[place]["at"], reverse=True)
    return [last[place] for place in sorted(places, key=lambda place: before.get(place, ""))]
