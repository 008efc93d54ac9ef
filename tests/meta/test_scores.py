"""Measures against closed forms and known cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, spearmanr

from metapeft.meta import scores

random = np.random.default_rng(0)


def test_crps_of_a_normal_is_the_closed_form() -> None:
    draws, seen = random.normal(0.3, 2.0, (20_000, 1)), np.array([1.5])
    z = (1.5 - 0.3) / 2.0
    closed = 2.0 * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert scores.crps(draws, seen)[0] == pytest.approx(closed, rel=0.02)
    assert scores.crps(np.full((9, 1), 0.4), np.array([0.7]))[0] == pytest.approx(0.3)  # of a point: the distance


def test_nll_of_a_normal() -> None:
    draws = random.normal(0, 1, (20_000, 1))
    found = scores.nll(draws, np.array([0.5]), np.array([1e-3]))[0]
    assert found == pytest.approx(-norm.logpdf(0.5), abs=0.03)
    assert np.isfinite(scores.nll(np.zeros((10, 1)), np.array([9.0]), np.array([0.01]))[0])


def test_calibration_error() -> None:
    chances = random.random(20_000)
    happened = (random.random(20_000) < chances).astype(float)
    assert scores.ece(chances, happened) < 0.02
    assert scores.ece(chances**2, happened) > 0.1
    assert scores.ece(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1.0
    assert scores.brier(np.array([1.0, 0.0]), np.array([1.0, 0.5])) == pytest.approx(0.125)
    assert sum(row["n"] for row in scores.reliability(chances, happened)) == 20_000


def test_spearman_with_ties() -> None:
    left, right = random.integers(0, 5, 50).astype(float), random.integers(0, 5, 50).astype(float)
    assert scores.spearman(left, right) == pytest.approx(spearmanr(left, right).statistic)
    assert scores.spearman(np.ones(5), right[:5]) == 0.0
