"""The gradient noise scale against gradients whose noise is known."""

from __future__ import annotations

import numpy as np
import pytest

from metapeft.runtime import mx
from metapeft.training.noise import GradientNoise


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (2, 2, 4)])
def test_it_is_variance_over_squared_norm(sizes: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    true, spread, width = 0.2, 1.5, 2000
    noise = GradientNoise()
    total = sum(sizes)
    for _ in range(60):
        shards = [(true + spread * random.standard_normal((n, width))).sum(axis=0) / total for n in sizes]
        noise.update([mx.array(s.astype(np.float32)) for s in shards], sizes)
    assert noise.scale() == pytest.approx(spread**2 / true**2, rel=0.25)


def test_one_shard_says_nothing() -> None:
    noise = GradientNoise()
    noise.update([mx.ones((3,))], [8])
    assert noise.scale() is None


def test_equal_gradients_have_no_noise() -> None:
    noise = GradientNoise()
    noise.update([mx.ones((3,)) / 2, mx.ones((3,)) / 2], [4, 4])
    assert noise.scale() is None or noise.scale() == pytest.approx(0, abs=1e-6)
