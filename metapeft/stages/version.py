"""version: reads the task and fixes its rows, its splits and their content id.

Writes task.json and data.jsonl: what every later stage reads instead of the source.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from metapeft.errors import UserError
from metapeft.settings import Settings, user_path
from metapeft.stages.files import write_task
from metapeft.stages.stage import Stage, content


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Load, split and version the task."""
    from metapeft.data.load import load_task

    task = load_task(settings.task, settings.data)
    write_task(task, out)
    sizes = {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)}
    facts = {"task": task.name, "version": task.version, "dvc_id": task.dvc_id, "kind": task.kind}
    return facts | sizes | {"warnings": list(task.notes)}


def source(settings: Settings, work: Path) -> str:
    """What a local file or folder holds; a catalog task is pinned by its hash, so its name says enough."""
    path = user_path(settings.task)
    try:
        return content(path) if os.path.exists(path) else ""  # Path.exists raises in a folder that may not be entered
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path} ({error.strerror}); check its permissions") from error


STAGE = Stage(
    "version",
    body,
    settings=("task", "data"),
    code=("metapeft/data", "metapeft/stages/version.py", "metapeft/stages/files.py"),
    outside=source,
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
