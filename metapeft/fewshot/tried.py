"""What a strategy came to on these shots, on disk until `metapeft adapt` ends: a killed one does not try it again."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

import numpy as np

from metapeft import __version__
from metapeft.data.shots import spelled
from metapeft.data.task import Task
from metapeft.fewshot.choose import Held, Strategy
from metapeft.fewshot.measure import Answers
from metapeft.profiling import cache
from metapeft.settings import home

KEPT = 30 * 86400.0  # seconds that a killed run is waited for


def place(task: Task, backbone: str, strategy: Strategy, seed: int) -> Path:
    """The file for a strategy on these shots; another where anything that its answers depend on differs.

    backbone: its identity.
    """
    way = (strategy.name, strategy.configuration, strategy.origin, strategy.made_of)
    return folder() / f"{_shots(task, backbone, seed)}-{_digest(way)}.json"


def folder() -> Path:
    return home() / "adapting"


def _shots(task: Task, backbone: str, seed: int) -> str:
    return _digest((__version__, task.kind, task.metric, task.labels, task.train, spelled(task), backbone, seed))


def _digest(about: object) -> str:
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def read(path: Path) -> Held | None:
    """None where there is none, or a damaged one."""
    record = cache.read(path)
    try:
        if record is None:
            return None
        answers = {
            int(step): Answers(*(np.array(row, dtype=float) for row in rows)) for step, rows in record["answers"]
        }
        shape = {len(row) for found in answers.values() for row in (found.hit, found.right, found.loss)}
        return Held(answers, float(record["seconds"])) if len(shape) == 1 else None
    except (KeyError, TypeError, ValueError):
        return None


def write(path: Path, held: Held) -> None:
    """Raises UserError when METAPEFT_HOME cannot be written."""
    rows = [[step, [each.hit.tolist(), each.right.tolist(), each.loss.tolist()]] for step, each in held.answers.items()]
    cache.write(path, {"answers": rows, "seconds": held.seconds})


def clear(task: Task, backbone: str, seed: int) -> None:
    """Once the adapter is registered: what was kept for these shots, and what nobody came back for."""
    for path in folder().glob("*"):
        with contextlib.suppress(OSError):
            if path.name.startswith(_shots(task, backbone, seed)) or time.time() - path.stat().st_mtime > KEPT:
                path.unlink()
