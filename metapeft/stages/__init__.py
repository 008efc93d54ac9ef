"""The pipeline: version → validate → profile → recommend → sweep → train → evaluate → register → report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
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
    """Run stages one after another in this process, each only where its output is not current.

    Where something is to be done, no other command works in the folder meanwhile. What there is to say is said at the
    end: before that, stderr belongs to the one line of a mistake.
    """
    from metapeft.progress import say
    from metapeft.stages.stage import alone

    done = all(get(name).current(settings, work) for name in names)
    with nullcontext() if done else alone(work):
        results = {name: get(name).run(settings, work) for name in names}
    for name, result in results.items():
        for warning in result.warnings:
            say(f"{name}: {warning}")
    if reused := [name for name, result in results.items() if result.cached]:
        say(f"unchanged since an earlier run, reused: {', '.join(reused)}")
    return results
