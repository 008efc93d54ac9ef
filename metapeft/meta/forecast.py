"""From gains to what a user will measure: draws of test scores, their intervals, and the chances of each configuration.

All configurations of a task are drawn together, each draw with one level of the task and one score of the untuned
backbone. A draw is what would be measured if every configuration were trained once and scored on the test split, so
that `p_best` and `p_within` can be checked against what was measured on other tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metapeft.meta import gains as scale
from metapeft.meta.evidence import Configuration, Known, Observation
from metapeft.meta.model import Conditioned, Model

DRAWS = 4000
USUAL_TESTS = 300  # examples of a test split, where the trials do not say
CLOSE = 0.01  # of the score: as good as the best


@dataclass(frozen=True)
class Forecast:
    """draws: (DRAWS, n) test scores in [0, 1]; start: (DRAWS,) those of the untuned backbone; the arrays below have one
    entry per configuration."""

    draws: np.ndarray
    start: np.ndarray
    mean: np.ndarray
    p_best: np.ndarray
    p_within: np.ndarray  # within CLOSE of the best of those listed

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def together(self, count: int, penalty: np.ndarray) -> list[int]:
        """Configurations to try all of, greedily those that raise the expected best the most, each less its penalty
        (n,): after the first, what does well where the others do not."""
        worth = self.draws - penalty
        chosen: list[int] = []
        best = np.full(len(worth), -np.inf)
        for _ in range(min(count, worth.shape[1])):
            raised = np.maximum(worth, best[:, None]).mean(axis=0)
            raised[chosen] = -np.inf
            chosen.append(int(raised.argmax()))
            best = np.maximum(best, worth[:, chosen[-1]])
        return chosen


def forecast(
    known: Conditioned,
    task: Known,
    candidates: Sequence[Configuration],
    steps: int,
    untuned: tuple[float, float],
    tests: int,
    seed: int = 0,
    device: str = "",
) -> Forecast:
    """untuned: the untuned backbone's score and its standard error. tests: examples of the test split. device: where
    the candidates will be trained."""
    mean, covariance = known.predict(task, candidates, steps, device)
    return drawn(known.model, mean, covariance, untuned, tests, seed)


def drawn(
    model: Model, mean: np.ndarray, covariance: np.ndarray, untuned: tuple[float, float], tests: int, seed: int = 0
) -> Forecast:
    random = np.random.default_rng(seed)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    away = random.standard_normal((DRAWS, len(mean))) @ root.T
    # A training's own luck, and which examples the test split has: partly the same for all configurations.
    value, error = untuned
    start = np.clip(value + error * random.standard_normal((DRAWS, 1)), 0, 1)
    expected = scale.score(mean, np.clip(value, 0, 1))
    room = np.where(mean >= 0, scale.room(value), scale.room(value, up=False))
    examples = np.sqrt(expected * (1 - expected) / max(1, tests)) / room
    own = min(1.0, model.deviations["sampling"])
    luck = np.sqrt(model.deviations["seed"] ** 2 + (own * examples) ** 2) * random.standard_normal(away.shape)
    common = np.sqrt(1 - own**2) * examples * random.standard_normal((DRAWS, 1))
    gains = mean + scaled(model, away + luck + common)
    scores = scale.score(gains, start)
    top = scores.max(axis=1, keepdims=True)
    ties = scores == top
    return Forecast(
        draws=scores,
        start=start[:, 0],
        mean=scores.mean(axis=0),
        p_best=(ties / ties.sum(axis=1, keepdims=True)).mean(axis=0),
        p_within=recalibrated((scores >= top - CLOSE).mean(axis=0), model.within),
    )


def recalibrated(chances: np.ndarray, within: tuple[float, float]) -> np.ndarray:
    """Chances (n,) after Platt's recalibration (1999): log odds times a slope plus an intercept. The order stays."""
    intercept, slope = within
    found: np.ndarray = 1 / (1 + np.exp(-intercept - slope * log_odds(chances)))
    return found


def log_odds(chances: np.ndarray) -> np.ndarray:
    """Of shares of DRAWS, never infinite."""
    kept = np.clip(chances, 1 / DRAWS, 1 - 1 / DRAWS)
    found: np.ndarray = np.log(kept / (1 - kept))
    return found


def scaled(model: Model, away: np.ndarray) -> np.ndarray:
    """Deviations from the mean, (draws, n), as wide as tasks left out showed them to be."""
    level = away.mean(axis=1, keepdims=True)
    return model.level_scale * level + model.choice_scale * (away - level)


def untuned_of(observations: Sequence[Observation]) -> tuple[float, float]:
    """The score that a task's profile gives the untuned backbone, and its standard error; without a profile, what its
    trials were measured from."""
    features = observations[0].task.features
    if features is None:
        base, tests = observations[0].untuned, tests_of(observations)
        return base, float(np.sqrt(base * (1 - base) / tests))
    return features["zero_shot_score"], features["zero_shot_standard_error"]


def tests_of(observations: Sequence[Observation]) -> int:
    """How many examples the test split of their task has."""
    return next((o.tests for o in observations if o.tests), USUAL_TESTS)
