"""Sweeps a tiny backbone for real, saying each step; started by test_trained.py, which kills it.

usage: sweeping.py MODEL TRIALS STEPS
"""

from __future__ import annotations

import sys

from metapeft.search import spaces, sweep
from metapeft.settings import Settings, SweepSettings
from metapeft.stages.trainer import Trainer
from metapeft.training import trainer
from tests.training import made


def main() -> None:
    model, trials, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    trainer.STATE_SECONDS = 0.0  # after every step
    train = Trainer(model, made.classification(), test=False)
    train.on_event = lambda event: print("step", event["step"], flush=True)
    settings = Settings(backbone=model, sweep=SweepSettings(trials=trials, steps=steps, repeats=0))
    space = spaces.space(["lora", "prompt"], {"rank": 2, "layers": 0, "tokens": [4, 8]})
    found = sweep.sweep(
        train,
        train.task,
        settings,
        space=space,
        on_trial=lambda trial, done, will: print("trial", trial.id, trial.status, flush=True),
    )
    print("complete" if found.complete else "incomplete", flush=True)


if __name__ == "__main__":
    main()
