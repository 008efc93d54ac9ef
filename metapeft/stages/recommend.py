"""recommend: ranks methods and configurations for the task.

Writes recommendation.json, and configurations.json: the ranked configurations alone, all that sweep and training read.
The experience counts as it is when the stage runs, without the trials of this very task: they would make each sweep's
own start stale. DVC does not watch the experience: `dvc repro --force recommend` takes in what is new.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.meta.experience import Experience
from metapeft.settings import Settings
from metapeft.stages.files import read_task
from metapeft.stages.stage import Stage, read_json, write_json
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from metapeft.meta import Recommendation


class OtherTasks(Experience):
    """The experience without one task."""

    def __init__(self, without: str):
        super().__init__()
        self.without = without

    def trials(self) -> list[Trial]:
        return [trial for trial in super().trials() if trial.task_version != self.without]


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Rank configurations by what the user prefers, within the user's limits."""
    version = read_json(work / "version" / "task.json")["version"]
    found = ranked(settings, work, OtherTasks(version)).to_json()
    write_json(out / "recommendation.json", found)
    entries = found["recommendations"]
    write_json(out / "configurations.json", [{"method": e["method"]} | e["configuration"] for e in entries])
    return {"basis": found["basis"], "first": entries[0]["method"], "count": len(entries)}


def ranked(settings: Settings, work: Path, experience: Experience) -> Recommendation:
    """The recommendation from the stages' outputs and what the experience knows."""
    from metapeft.meta import recommend
    from metapeft.profiling import Profile

    profile = Profile.from_json(read_json(work / "profile" / "profile.json"))
    return recommend(read_task(work / "version"), profile, settings, experience)


def learned(settings: Settings, work: Path) -> str:
    """What other tasks have taught about this backbone."""
    version = read_json(work / "version" / "task.json")["version"]
    known = [t for t in OtherTasks(version).trials() if t.backbone == settings.backbone]
    outcomes = sorted((t.id, t.status, t.score.value if t.score else None) for t in known)
    return hashlib.sha256(repr(outcomes).encode()).hexdigest() if outcomes else ""


STAGE = Stage(
    "recommend",
    body,
    settings=("backbone", "recommend", "train.steps"),
    needs=("version", "profile"),
    code=("metapeft/meta", "metapeft/stages/recommend.py"),
    outside=learned,
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
