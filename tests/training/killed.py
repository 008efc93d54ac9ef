"""Trains tiny adapters, one after another, saying each step; started by test_trainer.py, which kills it.

usage: killed.py MODEL FOLDER METHOD…: adapters that are there already are left alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from metapeft.backbones import load
from metapeft.training import trainer
from metapeft.training.session import Session
from tests.training import made

STEPS = 14
EXTRA = {"lora": {"dropout": 0.1}, "adalora": {"dropout": 0.1, "layers": 2}}


def main() -> None:
    folder = Path(sys.argv[2])
    trainer.STATE_SECONDS = 0.0  # after every step
    session = Session(load(sys.argv[1], dequantize=False), made.classification())
    for method in sys.argv[3:]:
        if (folder / method / "manifest.json").exists():
            continue
        configuration = {"method": method, "evaluations": 3} | made.SMALL.get(method, {}) | EXTRA.get(method, {})
        trial = trainer.run_trial(
            session,
            configuration,
            steps=STEPS,
            folder=folder / method,
            progress=lambda event: print("step", event["step"], flush=True),
        )
        assert trial.status == "ok" and len(trial.curve) == 3, trial
        print("done", method, flush=True)


if __name__ == "__main__":
    main()
