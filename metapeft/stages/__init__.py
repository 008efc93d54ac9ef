"""The pipeline: version → validate → profile → recommend → sweep → train → evaluate → register → report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metapeft.settings import Settings
    from metapeft.stages.stage import Result, Stage

NAMES = ("version", "validate", "profile", "recommend", "sweep", "train", "evaluate", "register", "report")


def get(name: str) -> Stage:
    """The stage of that name."""
    stage: Stage = import_module(f"metapeft.stages.{name}").STAGE
    return stage


def run(names: Sequence[str], settings: Settings, work: Path) -> dict[str, Result]:
    """Run stages one after another in this process, each only where its output is not current; says so on stderr."""
    from metapeft.progress import say

    results = {}
    for name in names:
        results[name] = get(name).run(settings, work)
        if results[name].cached:
            say(f"{name}: unchanged, reused")
    return results
