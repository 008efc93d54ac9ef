"""recommend: ranks methods and configurations for the task. Writes recommendation.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metapeft.settings import Settings
from metapeft.stages.files import read_task
from metapeft.stages.stage import Stage, read_json, write_json


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Rank configurations by what the user prefers, within the user's limits."""
    from metapeft.meta import recommend
    from metapeft.profiling import Profile

    task = read_task(work / "version")
    profile = Profile.from_json(read_json(work / "profile" / "profile.json"))
    found = recommend(task, profile, settings).to_json()
    write_json(out / "recommendation.json", found)
    first = found["recommendations"][0]
    return {"basis": found["basis"], "first": first["method"], "count": len(found["recommendations"])}


STAGE = Stage(
    "recommend",
    body,
    settings=("backbone", "recommend"),
    needs=("version", "profile"),
    code=("metapeft/meta", "metapeft/stages/recommend.py"),
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
