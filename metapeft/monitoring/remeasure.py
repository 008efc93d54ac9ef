"""Are kept profiles still what their tasks measure like?

A profile is measured once and then believed: by every recommendation, and by the next meta-model. Where it was measured
by a process in a wrong state, or with other versions of what it is measured with, nothing that is fitted to it helps.
So now and then a task whose rows are still here is measured again. Measuring is deterministic: what differs is wrong,
the first time, and then every task at hand is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.meta import decisions as given
from metapeft.monitoring import state
from metapeft.profiling import Profile, every_profile, profiles
from metapeft.progress import say

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

# Usual spreads of a feature (`profiles.SCALES`). Another engine moves a rounded answer or two of a small sample.
TOLERANCE = 0.25

Find = Callable[[dict[str, Any]], Task | None]


@dataclass(frozen=True)
class Remeasured:
    """moved: the features that differ by more than the tolerance, the most first, in usual spreads; none: as kept."""

    task: Task
    measured: Profile
    moved: dict[str, float]
    at: str

    @property
    def place(self) -> str:
        """By which the monitor's state knows it."""
        return f"{self.measured.task_version} {self.measured.backbone}"

    def mend(self) -> None:
        """Keep what was measured now. Raises UserError when METAPEFT_HOME cannot be written."""
        if self.moved:
            profiles.keep(self.measured, self.task)


def run(count: int, find: Find, backbone: Callable[[str], Backbone]) -> list[Remeasured]:
    """Measure `count` tasks of recommendations again, those first that never were; all at hand where one differs.
    Nothing is written.

    find: the task of a decision, None where its rows are no longer here. backbone: loads one by its id.
    """
    load = cache(backbone)
    found: list[Remeasured] = []
    for entry, kept in _due(given.read(), every_profile(), state.read().remeasured):
        if len(found) >= count and not any(each.moved for each in found):
            break
        try:
            task = find(entry)
            if task is None:
                continue
            base = load(entry["backbone"])
            if base.content_id != kept.backbone_content:
                continue  # another backbone of that name
            measured = profiles.measure(task, base)
        except UserError as error:
            say(f"the profile of {entry['task']} was not measured again: {error}")
            continue
        moved = differences(_embedded(kept), _embedded(measured))
        found.append(Remeasured(task, measured, moved, datetime.now(UTC).isoformat(timespec="seconds")))
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


def _due(
    entries: Sequence[dict[str, Any]], kept: Mapping[tuple[str, str], Profile], before: Mapping[str, str]
) -> Iterator[tuple[dict[str, Any], Profile]]:
    """Profiled tasks of decisions, each once: those never measured again first, the latest decided of them; then those
    that were, the longest ago first."""
    tasks = {(entry["task_version"], entry["backbone"]): entry for entry in entries}
    places = [place for place in reversed(tasks) if place in kept]
    for place in sorted(places, key=lambda place: before.get(" ".join(place), "")):
        yield tasks[place], kept[place]
