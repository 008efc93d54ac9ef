"""Grows the experience on tiny tasks, saying each trial; started by test_grow.py, which kills it.

usage: growing.py MODEL TRIALS
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from metapeft.backbones import load
from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.meta import plan
from metapeft.search.grow import Grown, grow
from metapeft.settings import DataSettings
from tests.training import made

SIZES = (DataSettings(max_train=40), DataSettings(max_train=10))
STEPS = 3
ROWS = plan.CONFIGURATIONS[::4]  # of every method at least one


def task(name: str, settings: DataSettings) -> Task:
    """Made tasks called t1, t2, …"""
    if not name.startswith("t"):
        raise UserError(f"no task {name}")
    made_task = made.classification(train=settings.max_train, rest=6, longest=8, seed=int(name[1:]))
    return replace(made_task, name=name, version=f"{name}-{settings.max_train}", family=name)


def grown(model: str, tasks: list[str], **options: Any) -> Grown:
    with patch.object(plan, "CONFIGURATIONS", ROWS):
        return grow(tasks, load(model, dequantize=False), steps=STEPS, sizes=SIZES, **{"load": task, **options})


def main() -> None:
    found = grown(
        sys.argv[1],
        ["t1", "t2"],
        max_trials=int(sys.argv[2]),
        on_plan=lambda _: print("plan", flush=True),
        on_trial=lambda _, trial: print("trial", trial.id, trial.status, flush=True),
    )
    print("interrupted" if found.interrupted else "end", found.trials, flush=True)


if __name__ == "__main__":
    main()
