"""Experience with a known truth: tasks with latent traits that their profiles show, methods that suit some traits.

What is true of it: each method has a best learning rate that moves with the task's first trait; methods gain or lose
with the second; tasks differ in level and in how much the choice matters. Scores are binomial on the test split.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from metapeft.data import catalog
from metapeft.meta.evidence import Observation, gather
from metapeft.meta.teacher import taught
from metapeft.peft import METHODS
from metapeft.profiling.profiles import SCALES
from metapeft.settings import DEFAULT_BACKBONE
from metapeft.training.configuration import LEARNING_RATES, full
from metapeft.training.trial import Score, Trial, trial_id

BACKBONE = DEFAULT_BACKBONE
CONFIGURATIONS = [
    full({"method": method, "learning_rate": LEARNING_RATES[method] * factor})
    for method in METHODS
    for factor in (0.1, 0.3, 1.0, 3.0)
]


@dataclass(frozen=True)
class Kind:
    """What the task is: traits (4,), untuned score, and the expected test score of every configuration."""

    name: str
    version: str
    traits: np.ndarray
    untuned: float
    truth: np.ndarray
    features: dict[str, float]


@dataclass
class Nature:
    """What is true of all tasks. rates: what another device adds to the logarithm of every best learning rate."""

    methods: np.ndarray
    suits: np.ndarray
    kinds: dict[str, np.ndarray]  # family -> the middle of its tasks' traits
    transfer: float = 1.0  # how much of what suits a task its profile tells (0: nothing)
    rates: float = 0.0

    @classmethod
    def drawn(cls, random: np.random.Generator, transfer: float = 1.0) -> Nature:
        methods = random.normal(0, 0.06, len(METHODS))
        suits = random.normal(0, 0.12, len(METHODS))
        return cls(methods, suits, {e.family: random.normal(size=4) for e in catalog.entries()}, transfer)

    def task(self, random: np.random.Generator, name: str, middle: np.ndarray) -> Kind:
        """A task of a family whose traits lie around `middle`."""
        traits = 0.6 * middle + 0.8 * random.normal(size=4)
        shown = self.transfer * traits + np.sqrt(1 - self.transfer**2) * random.normal(size=4)
        untuned = float(np.clip(0.3 + 0.15 * random.normal(), 0.02, 0.9))
        spread = float(np.exp(0.3 * random.normal()))
        level = 0.55 + 0.12 * traits[2] + 0.1 * random.normal()
        gains = []
        for configuration in CONFIGURATIONS:
            method = METHODS.index(configuration["method"])
            off = np.log(configuration["learning_rate"] / LEARNING_RATES[configuration["method"]])
            off -= 0.8 * traits[0] + self.rates
            own = self.methods[method] + self.suits[method] * traits[1] - 0.05 * off**2 + 0.03 * random.normal()
            gains.append(level + spread * own)
        truth = np.clip(untuned + np.clip(gains, -0.2, 1) * (1 - untuned), 0.01, 0.995)
        measured = dict.fromkeys(SCALES, 0.1) | {
            "train_examples": 1000.0,
            "zero_shot_score": untuned,
            "zero_shot_standard_error": 0.03,
            "classification": 0.0,
            "zero_shot_loss": 10 ** (0.4 + 0.2 * shown[0]) - 1,
            "label_entropy": 0.7 + 0.3 * shown[1],
            "probe_accuracy": 0.5 + 0.2 * shown[2],
            "word_length": 4.5 + shown[3],
            **{name: 0.25 * float(random.normal()) for name in SCALES if name.startswith("domain")},
        }
        return Kind(name, f"{name:0<16}"[:16], traits, untuned, truth, measured)


def trial(
    random: np.random.Generator, task: Kind, index: int, run: int = 0, tests: int = 300, started: str = ""
) -> Trial:
    """A configuration tried on a task: seeds vary the truth a little, test examples do the rest."""
    configuration = CONFIGURATIONS[index]
    value = np.clip(task.truth[index] + 0.01 * random.normal(), 0.005, 0.995)
    hit, held = random.binomial(tests, value) / tests, random.binomial(tests // 2, value) / (tests // 2)
    loss = float(2.5 * np.exp(-2 * value + 0.05 * random.normal()))
    untuned = task.untuned
    return Trial(
        id=trial_id(task.name, task.version, BACKBONE, configuration, run, 40, 1000),
        task=task.name,
        task_version=task.version,
        backbone=BACKBONE,
        method=configuration["method"],
        configuration=configuration,
        seed=run,
        budget=40,
        status="ok",
        score=_score(hit, tests, loss),
        validation=_score(held, tests // 2, loss),
        untuned_score=Score("accuracy", untuned, float(np.sqrt(untuned * (1 - untuned) / tests)), tests, 2.0),
        device="cpu",
        seconds=60.0,
        peak_memory_mb=800.0,
        train_examples=1000,
        started=started,
    )


@dataclass
class World:
    """`truth`: task name -> the expected test score of every configuration."""

    trials: list[Trial]
    features: dict[tuple[str, str], dict[str, float]]
    truth: dict[str, np.ndarray]
    traits: dict[str, np.ndarray] = field(default_factory=dict)
    nature: Nature | None = None

    def observations(self) -> list[Observation]:
        return taught(gather(self.trials, self.features))


def world(
    tasks: int = 40, seed: int = 0, transfer: float = 1.0, seeds: int = 1, tests: int = 300, filled: float = 1.0
) -> World:
    """transfer: how much of what suits a task its profile tells (0: nothing). filled: share of the table that is
    run."""
    random = np.random.default_rng(seed)
    names = [e.name for e in catalog.entries()][:tasks]
    found = World([], {}, {}, nature=Nature.drawn(random, transfer))
    assert found.nature is not None
    for number, name in enumerate(names):
        task = found.nature.task(random, name, found.nature.kinds[catalog.get(name).family])
        found.truth[name], found.traits[name] = task.truth, task.traits
        found.features[task.version, BACKBONE] = task.features
        for index in range(len(CONFIGURATIONS)):
            if random.random() > filled:
                continue
            for run in range(seeds):
                started = f"2026-01-01T00:00:{number:02d}+00:00"
                found.trials.append(trial(random, task, index, run, tests, started))
    return found


def _score(value: float, n: int, loss: float) -> Score:
    return Score("accuracy", float(value), float(np.sqrt(max(value * (1 - value), 1 / n) / n)), n, loss)
