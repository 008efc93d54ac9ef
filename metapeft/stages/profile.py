"""profile: measures what characterises the task for this backbone. Writes profile.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metapeft.settings import Settings
from metapeft.stages.files import read_task
from metapeft.stages.stage import Stage, write_json
from metapeft.training.engine import SOURCES


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Measure size, complexity and domain."""
    from metapeft import backbones
    from metapeft.profiling import profile, speed

    backbone = backbones.load(settings.backbone)
    found = profile(read_task(work / "version"), backbone)
    speed.of(backbone)  # of this machine, so kept in METAPEFT_HOME: no part of the output
    write_json(out / "profile.json", found.to_json())
    return {"version": found.version, "features": len(found.features)}


STAGE = Stage(
    "profile",
    body,
    settings=("backbone",),
    needs=("version", "validate"),
    code=("metapeft/profiling", *SOURCES, "metapeft/stages/files.py", "metapeft/stages/profile.py"),
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
