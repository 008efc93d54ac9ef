"""The vectorised activations are MLX's own, to float32 rounding, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from metapeft.backbones import activations
from metapeft.runtime import device, mx, nn

X = np.concatenate([np.linspace(-40, 40, 40_001), np.linspace(-1, 1, 2_001), [-1e4, 1e4, 0.0]]).astype(np.float32)
PAIRS = [(activations.silu, nn.silu), (activations.gelu_approx, nn.gelu_approx)]


def slope(function: Callable[[mx.array], mx.array]) -> np.ndarray:
    return np.array(mx.grad(lambda x: function(x).sum())(mx.array(X)))


def test_tanh() -> None:
    exact = np.tanh(X.astype(np.float64))
    assert np.abs(np.array(activations.tanh(mx.array(X))) - exact).max() < 4e-7


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=["silu", "gelu_approx"])
def test_value_and_slope(ours: Callable[[mx.array], mx.array], theirs: Callable[[mx.array], mx.array]) -> None:
    value, expected = np.array(ours(mx.array(X))), np.array(theirs(mx.array(X)))
    assert (np.abs(value - expected) <= 4e-7 * np.maximum(1, np.abs(X))).all()
    near = np.abs(X) < 30  # MLX's own derivative of gelu_approx is not a number far out
    assert np.abs(slope(ours) - slope(theirs))[near].max() < 2e-5
    assert np.isfinite(slope(ours)).all()


@pytest.mark.parametrize("ours", [pair[0] for pair in PAIRS], ids=["silu", "gelu_approx"])
def test_it_compiles_for_any_shape(ours: Callable[[mx.array], mx.array]) -> None:
    compiled = mx.compile(ours, shapeless=True)
    for n in (3, 5):
        x = mx.array(X[:n] / 10)
        assert np.allclose(compiled(x), ours(x), atol=1e-6)


@pytest.mark.skipif(device() != "cpu", reason="only a CPU needs them")
def test_they_replace_mlx_in_float32_while_the_block_runs() -> None:
    before = (nn.silu, nn.gelu_approx)
    x = mx.array([0.3, -2.0])
    with activations.vectorised():
        assert np.array_equal(nn.silu(x), activations.silu(x))
        half = nn.silu(x.astype(mx.float16))
        assert half.dtype == mx.float16 and np.array_equal(half, before[0](x.astype(mx.float16)))
        with activations.vectorised():
            pass
        assert np.array_equal(nn.gelu_approx(x), activations.gelu_approx(x))
    assert (nn.silu, nn.gelu_approx) == before
    with pytest.raises(ValueError), activations.vectorised():
        raise ValueError
    assert (nn.silu, nn.gelu_approx) == before
