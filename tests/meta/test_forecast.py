from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metapeft.meta import gains
from metapeft.meta.evidence import gather
from metapeft.meta.forecast import Forecast, drawn, untuned_of
from metapeft.meta.model import Model
from tests.meta.made import trial


def told(draws: np.ndarray) -> Forecast:
    n = draws.shape[1]
    return Forecast(draws, np.zeros(len(draws)), draws.mean(axis=0), np.full(n, 1 / n), np.full(n, 1 / n))


@given(st.integers(0, 1000), st.integers(1, 7), st.integers(1, 3))
def test_together_is_nearly_the_best_set_and_each_adds_less(seed: int, n: int, count: int) -> None:
    random = np.random.default_rng(seed)
    draws, penalty = random.random((50, n)), random.random(n) / 10
    chosen = told(draws).together(count, penalty)
    assert len(chosen) == len(set(chosen)) == min(count, n)
    worth = draws - penalty
    assert chosen[0] == worth.mean(axis=0).argmax()
    reached = [worth[:, chosen[:k]].max(axis=1).mean() for k in range(1, len(chosen) + 1)]
    gains = np.diff(reached)
    assert (gains >= -1e-12).all() and (np.diff(gains) <= 1e-12).all()
    # Greedy choice of a submodular gain: at least 1 - 1/e of the best set's, above the lowest worth (Nemhauser 1978).
    best = max(worth[:, list(s)].max(axis=1).mean() for s in combinations(range(n), min(count, n)))
    assert reached[-1] - worth.min() >= (1 - 1 / np.e) * (best - worth.min()) - 1e-12


def test_together_hedges_between_kinds_of_task() -> None:
    """Two that do well on the same draws and one that does well on the others: the pair takes one of each."""
    well = np.random.default_rng(0).random(1000) < 0.6
    draws = np.stack([well * 0.9, well * 0.89, ~well * 0.8], axis=1)
    assert told(draws).together(2, np.zeros(3)) == [0, 2]


@pytest.mark.parametrize(("untuned", "expected"), [(0.9, 0.6), (0.9, 0.95), (0.1, 0.05), (0.1, 0.5), (0.5, 0.3)])
def test_the_luck_of_a_test_split_is_binomial_above_and_below_the_untuned_backbone(
    untuned: float, expected: float
) -> None:
    model = replace(Model(), deviations=Model().deviations | {"seed": 0.0, "sampling": 1.0})
    gain = np.array([gains.gain(expected, untuned)])
    told = drawn(model, gain, np.array([[1e-12]]), (untuned, 0.0), 300)
    assert told.draws.std() == pytest.approx(np.sqrt(expected * (1 - expected) / 300), rel=0.1)


def test_without_a_profile_the_trials_tell_the_untuned_score() -> None:
    seen = gather([trial(0.9, untuned=0.6)], {})
    assert untuned_of(seen) == (0.6, pytest.approx(np.sqrt(0.24 / 300)))
