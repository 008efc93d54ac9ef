"""sweep_plan: prepares a sweep that several workers share, and says how many of them are worth starting.

Begins the MLflow run that they all write into. Prints one list of arguments per worker
(`metapeft.stages.sweep_worker`): none where the sweep is done already.
The stage `sweep` afterwards gathers what the workers did, and does what they left undone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from metapeft.errors import UserError
from metapeft.settings import Settings
from metapeft.stages.stage import Result, options, process
from metapeft.stages.sweep import OVER, STAGE, prepare


def run(settings: Settings, work: Path, workers: int) -> Result:
    """The summary is the list of the workers' arguments."""
    from metapeft.search.sweep import load
    from metapeft.stages.tracked import pipeline_run

    started = time.perf_counter()
    if STAGE.current(settings, work):
        return Result("sweep_plan", work, [], True, time.perf_counter() - started)
    prepared = prepare(settings, work)
    with pipeline_run(settings, work, prepared.task):
        pass
    try:
        done = len(load(prepared.study, prepared.task, settings).trials)
    except UserError:  # nobody has begun it
        done = 0
    (work / OVER).unlink(missing_ok=True)
    count = max(0, min(workers, settings.sweep.trials - done))
    plan = [["--worker", f"{number} of {count}"] for number in range(1, count + 1)]
    return Result("sweep_plan", work, plan, False, time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options("sweep_plan", __doc__)
    parser.add_argument("--workers", type=_positive, default=1, help="how many may work at the same time")
    return process(parser, lambda settings, given: run(settings, given.work, given.workers), arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers; give 1 or more")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
