"""profile: measures what characterises the task for this backbone. Writes profile.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metapeft.progress import say
from metapeft.settings import Settings
from metapeft.stages.files import read_task
from metapeft.stages.stage import Stage, write_json
from metapeft.training.engine import SOURCES

LONG = 4_000  # characters of a prompt: some thirty of them take most of a minute on two slow cores


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Measure size, complexity and domain."""
    from metapeft import backbones
    from metapeft.profiling import profile, speed

    backbone = backbones.load(settings.backbone)
    task = read_task(work / "version")
    longest = max((len(str(example.prompt)) for example in task.train), default=0)
    if longest > LONG:
        say(f"profile: reads rows of up to {longest:,} characters with the backbone, which may take minutes")
    found = profile(task, backbone)
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
