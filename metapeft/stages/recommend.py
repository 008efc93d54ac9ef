"""recommend: ranks methods and configurations for the task.

Writes recommendation.json; configurations.json, the ranked configurations alone; and nearest.json, the configurations
on the fronts of the most similar tasks, where a sweep starts too.
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

if TYPE_CHECKING:
    from metapeft.meta import Recommendation


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Rank configurations by what the user prefers, within the user's limits."""
    from metapeft.search.warm import nearest_fronts

    version = read_json(work / "version" / "task.json")["version"]
    found = ranked(settings, work, own=False).to_json()
    write_json(out / "recommendation.json", found)
    trials = [t for t in Experience().trials() if t.backbone == settings.backbone and t.task_version != version]
    write_json(out / "nearest.json", nearest_fronts(trials, [n["task"] for n in found["neighbours"]]))
    entries = found["recommendations"]
    write_json(out / "configurations.json", [{"method": e["method"]} | e["configuration"] for e in entries])
    return {"basis": found["basis"], "first": entries[0]["method"], "count": len(entries)}


def ranked(settings: Settings, work: Path, own: bool = True) -> Recommendation:
    """The recommendation from the stages' outputs and what the experience knows; written down among the decisions.

    own: whether trials of this very task count.
    """
    from metapeft.meta import decisions, recommend
    from metapeft.profiling import Profile

    profile = Profile.from_json(read_json(work / "profile" / "profile.json"))
    found = recommend(read_task(work / "version"), profile, settings, own=own)
    decisions.record(found, settings.train.steps)
    return found


def learned(settings: Settings, work: Path) -> str:
    """What other tasks have taught, and the model that makes something of it."""
    from metapeft.meta import versions

    version = read_json(work / "version" / "task.json")["version"]
    known = [t for t in Experience().trials() if t.task_version != version]
    outcomes = sorted((t.id, t.status, t.score.value if t.score else None) for t in known)
    return hashlib.sha256(repr((outcomes, versions.champion().model)).encode()).hexdigest() if outcomes else ""


STAGE = Stage(
    "recommend",
    body,
    settings=("backbone", "recommend", "train.steps"),
    needs=("version", "profile"),
    code=(
        "metapeft/meta",
        "metapeft/peft",
        "metapeft/profiling",
        "metapeft/search/pareto.py",
        "metapeft/search/spaces.py",
        "metapeft/search/warm.py",
        "metapeft/training/configuration.py",
        "metapeft/stages/files.py",
        "metapeft/stages/recommend.py",
    ),
    outside=learned,
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
