"""Experience with a known truth: tasks with latent traits that their profiles show, methods that suit some traits.

What is true of it: each method has a best learning rate that moves with the task's first trait; methods gain or lose
with the second; tasks differ in level and in how much the choice matters. Scores are binomial on the test split.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from metapeft.data import catalog
from metapeft.meta.evidence import Observation, gather, key
from metapeft.meta.teacher import taught
from metapeft.peft import METHODS
from metapeft.profiling.profiles import SCALES
from metapeft.training.configuration import LEARNING_RATES, full
from metapeft.training.trial import Score, Trial, trial_id
from tests.meta.made import BACKBONE

CONFIGURATIONS = [
    full({"method": method, "learning_rate": LEARNING_RATES[method] * factor})
    for method in METHODS
    for factor in (0.1, 0.3, 1.0, 3.0)
]


@dataclass
class World:
    """`truth`: task name -> the expected test score of every configuration."""

    trials: list[Trial]
    features: dict[tuple[str, str], dict[str, float]]
    truth: dict[str, np.ndarray]
    traits: dict[str, np.ndarray] = field(default_factory=dict)

    def observations(self) -> list[Observation]:
        return taught(gather(self.trials, self.features))


def world(
    tasks: int = 40, seed: int = 0, transfer: float = 1.0, seeds: int = 1, tests: int = 300, filled: float = 1.0
) -> World:
    """transfer: how much of what suits a task its profile tells (0: nothing). filled: share of the table that is
    run."""
    random = np.random.default_rng(seed)
    names = [e.name for e in catalog.entries()][:tasks]
    methods = random.normal(0, 0.06, len(METHODS))
    suits = random.normal(0, 0.12, len(METHODS))
    found = World([], {}, {})
    kinds = {e.family: random.normal(size=4) for e in catalog.entries()}
    for number, name in enumerate(names):
        entry = catalog.get(name)
        traits = 0.6 * kinds[entry.family] + 0.8 * random.normal(size=4)
        shown = transfer * traits + np.sqrt(1 - transfer**2) * random.normal(size=4)
        untuned = float(np.clip(0.3 + 0.15 * random.normal(), 0.02, 0.9))
        spread = float(np.exp(0.3 * random.normal()))
        level = 0.55 + 0.12 * traits[2] + 0.1 * random.normal()
        gains = []
        for configuration in CONFIGURATIONS:
            method = METHODS.index(configuration["method"])
            off = np.log(configuration["learning_rate"] / LEARNING_RATES[configuration["method"]])
            off -= 0.8 * traits[0]
            own = methods[method] + suits[method] * traits[1] - 0.05 * off**2 + 0.03 * random.normal()
            gains.append(level + spread * own)
        truth = np.clip(untuned + np.clip(gains, -0.2, 1) * (1 - untuned), 0.01, 0.995)
        version = f"{name:0<16}"[:16]
        found.truth[name], found.traits[name] = truth, traits
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
        found.features[version, BACKBONE] = measured
        base = Score("accuracy", untuned, float(np.sqrt(untuned * (1 - untuned) / tests)), tests, 2.0)
        for index, configuration in enumerate(CONFIGURATIONS):
            if random.random() > filled:
                continue
            for run in range(seeds):
                value = np.clip(truth[index] + 0.01 * random.normal(), 0.005, 0.995)
                hit, held = random.binomial(tests, value) / tests, random.binomial(tests // 2, value) / (tests // 2)
                loss = float(2.5 * np.exp(-2 * value + 0.05 * random.normal()))
                found.trials.append(
                    Trial(
                        id=trial_id(name, version, BACKBONE, configuration, run, 40, 1000),
                        task=name,
                        task_version=version,
                        backbone=BACKBONE,
                        method=configuration["method"],
                        configuration=configuration,
                        seed=run,
                        budget=40,
                        status="ok",
                        score=_score(hit, tests, loss),
                        validation=_score(held, tests // 2, loss),
                        untuned_score=base,
                        device="cpu",
                        seconds=60.0,
                        peak_memory_mb=800.0,
                        train_examples=1000,
                        started=f"2026-01-01T00:00:{number:02d}+00:00",
                    )
                )
    return found


def _score(value: float, n: int, loss: float) -> Score:
    return Score("accuracy", float(value), float(np.sqrt(max(value * (1 - value), 1 / n) / n)), n, loss)


def key_of(configuration: dict[str, object]) -> str:
    return key(configuration)
