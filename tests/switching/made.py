"""Trainings on tiny models that may switch, with advice made by hand: no experience, prices as round numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from metapeft.meta.evidence import Known
from metapeft.meta.model import Model
from metapeft.switching import run
from metapeft.switching.advice import Advice, Alternative
from metapeft.switching.decide import Policy
from metapeft.switching.forecast import Forecaster, Joint
from metapeft.switching.prices import Price
from metapeft.switching.record import Record
from metapeft.training.session import Session
from metapeft.training.trial import Score, Trial
from tests.training import made

SMALL: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "learning_rate": 0.01, "rank": 2},
    "adalora": {"method": "adalora", "learning_rate": 0.01, "initial_rank": 3, "target_rank": 2},
    "prefix": {"method": "prefix", "learning_rate": 0.02, "tokens": 4},
    "prompt": {"method": "prompt", "learning_rate": 0.02, "tokens": 4},
    "p_tuning": {"method": "p_tuning", "learning_rate": 0.005, "tokens": 4, "width": 16},
}
PRICE = Price(once=1.0, step=1.0, look=0.5, confirm=0.25)
POLICY = Policy(looks=4)


class Certain(Forecaster):
    """Sure from the first look on that going on is worth little, and what each alternative is worth."""

    def __init__(self, worth: dict[str, float], untuned: float):
        super().__init__(Known("v", "tiny", "t", "t", 40), [], [], Model(), untuned, 100)
        self.worth = worth

    def before(self, options: Any) -> Joint:
        means = np.array([self.worth.get(c["method"], 0.0) for c, _ in options])
        return Joint(means, np.diag([0.02**2] * len(means)))

    def ahead(self, curve: Any, steps: int) -> tuple[float, float]:
        return 0.0, 0.005


class Changing(Certain):
    """Of another opinion once a leg has been looked at."""

    def __init__(self, worth: dict[str, float], later: dict[str, float], untuned: float):
        super().__init__(worth, untuned)
        self.later = later

    def ahead(self, curve: Any, steps: int) -> tuple[float, float]:
        self.worth = self.later
        return super().ahead(curve, steps)


def advice(start: str, *others: str, untuned: float = 0.3, **worth: float) -> Advice:
    alternatives = tuple(Alternative(SMALL[o], PRICE) for o in others)
    return Advice(Alternative(SMALL[start], PRICE), alternatives, Certain(worth, untuned))


def session() -> Session:
    found = made.session(task=made.classification())
    found.untuned["test"] = Score("accuracy", 0.3, 0.1, 12, 2.0)
    return found


def train(
    at: Session, folder: Path, start: str, *others: str, policy: Policy = POLICY, steps: int = 30, **worth: float
) -> tuple[Trial, Record]:
    """From `start`, with the budget of `steps`."""
    given = advice(start, *others, **worth)
    return run.train(at, SMALL[start], lambda _: given, steps=steps, folder=folder, policy=policy)
