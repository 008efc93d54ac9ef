"""A switched training on a tiny model that says each step; started by test_run.py, which kills it.

usage: killed.py MODEL FOLDER METHOD OTHER...
"""

from __future__ import annotations

import sys
from pathlib import Path

from metapeft.backbones import load
from metapeft.switching import run
from metapeft.training import trainer
from metapeft.training.session import Session
from metapeft.training.trial import Score
from tests.switching import made
from tests.training.made import classification


def main() -> None:
    trainer.STATE_SECONDS = 0.0  # after every step
    session = Session(load(sys.argv[1], dequantize=False), classification())
    session.untuned["test"] = Score("accuracy", 0.3, 0.1, 12, 2.0)
    first, *others = sys.argv[3:]
    advice = made.advice(first, *others, untuned=0.0, lora=0.5, prefix=0.9)
    run.train(
        session,
        made.SMALL[first],
        lambda _: advice,
        steps=24,
        folder=Path(sys.argv[2]),
        policy=made.POLICY,
        progress=lambda event: print("leg", event["leg"], "step", event["step"], flush=True),
    )
    print("done", flush=True)


if __name__ == "__main__":
    main()
