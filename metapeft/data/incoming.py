"""A task file that came in or changed: read, checked, put under DVC and copied to its remote."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metapeft.data import versions
from metapeft.errors import UserError
from metapeft.settings import DataSettings


@dataclass(frozen=True)
class Incoming:
    """What DVC has now. `changed`: whether it or its remote had something else, or nothing; `pushed`: files sent."""

    file: str
    task: str
    version: str
    dvc_id: str
    rows: int
    changed: bool
    pushed: int
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def version(path: Path, settings: DataSettings | None = None) -> Incoming:
    """Check a task file (or folder) and put it under DVC; doing it again changes nothing.

    Raises UserError when the task is broken (it is then left as it was in DVC), or when `path` is not DVC's to keep:
    outside a repository, or tracked by Git.
    """
    from metapeft.data.load import load_task
    from metapeft.data.validation import validate

    if not path.exists():
        raise UserError(f"there is no file {path}; give a task file or folder")
    if versions.repository(path.absolute()) is None:
        raise UserError(f"{path} is in no DVC repository; run `dvc init` in the project's folder")
    task = load_task(str(path), settings)
    report = validate(task)
    report.raise_on_error()
    before = versions.tracked(path)
    identity = versions.track(path)
    if versions.tracked(path) != identity:
        raise UserError(f"DVC does not take {path}: Git or dvc.yaml has it; `git rm --cached {path}` frees it")
    pushed = versions.push(path)
    changed = before != identity or pushed > 0  # what an earlier call could not push is new to all others
    rows = len(task.train) + len(task.validation) + len(task.test)
    warnings = tuple(map(str, report.summary().get("warnings", ())))
    return Incoming(str(path), task.name, task.version, identity, rows, changed, pushed, warnings)
