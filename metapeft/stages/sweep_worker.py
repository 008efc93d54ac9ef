"""sweep_worker: one of several processes, on one machine or many, that train the trials of one sweep.

All of them work on the study of the stage `sweep`: each claims a trial, trains it, records it, and goes on until the
study has its trials. What a killed worker had in hand is claimed again by another, or by the stage itself.

Whoever starts workers has given each its place (Airflow: a slot of the pool `mlx`), so they do not take turns with the
other sweeps of the machine (`metapeft.search.slots`).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metapeft.settings import Settings
from metapeft.stages.stage import Result, options, process, write_json
from metapeft.stages.sweep import OVER, prepare
from metapeft.training.trial import Trial

PLACES = "METAPEFT_SLOTS"


def run(settings: Settings, work: Path, label: str = "sweep") -> Result:
    """Summary: which trials this worker trained."""
    from metapeft.stages.tracked import pipeline_run

    started = time.perf_counter()
    alone = settings.model_copy(update={"sweep": settings.sweep.model_copy(update={"workers": 1})})
    prepared = prepare(alone, work)
    train, task = prepared.train, prepared.task
    own: list[str] = []

    def on_own(configuration: dict[str, Any], seed: int, steps: int, trial_id: str, *more: Any) -> Trial:
        own.append(trial_id)
        return train(configuration, seed, steps, trial_id, *more)

    if not prepared.over(work):
        with pipeline_run(settings, work, task) as tracker:
            found = prepared.run(
                lambda trial: tracker.log_trial(trial, task) if trial.id in own else None, label, on_own
            )
        if found.late:
            write_json(work / OVER, prepared.limit)
    return Result("sweep_worker", work, {"trials": own}, False, time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options("sweep_worker", __doc__)
    parser.add_argument("--worker", default="", help="which one this is, for the log: 1 of 4")
    with tempfile.TemporaryDirectory(prefix="metapeft-place-") as place:
        os.environ[PLACES] = place
        return process(
            parser, lambda settings, given: run(settings, given.work, f"sweep {given.worker}".strip()), arguments
        )


if __name__ == "__main__":
    raise SystemExit(main())
