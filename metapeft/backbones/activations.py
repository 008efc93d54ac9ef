"""Activations that a CPU can vectorise.

On a CPU, MLX computes exp, tanh and sigmoid one element at a time, some 12 ns each: in a small model's feed-forward
layers that is a third of the time of the products. Sums, products and quotients run several at a time. So here the
hyperbolic tangent is a ratio of two polynomials that differs from it by no more than float32 rounding does (3e-7 at
most), and the rest is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from metapeft.runtime import device, mx, nn

# tanh(x) = x P(x^2) / Q(x^2) on [-8, 8]: least squares, reweighted until the largest relative error was least, 6e-9.
NUMERATOR = (1.0, 0.13444490730762482, 0.0035715887788683176, 2.189450060541276e-05, 1.5230172678570852e-08)
DENOMINATOR = (1.0, 0.46777817606925964, 0.026164406910538673, 0.0003411276557017118, 8.522351322426402e-07)
BOUND = 8.0


def tanh(x: mx.array) -> mx.array:
    """Not meant to be differentiated: see `_differentiable`."""
    x = mx.clip(x, -BOUND, BOUND)
    z = x * x
    return x * _polynomial(NUMERATOR, z) / _polynomial(DENOMINATOR, z)


def silu(x: mx.array) -> mx.array:
    constant = mx.stop_gradient(x)
    sigmoid = 0.5 * tanh(0.5 * constant) + 0.5
    value = constant * sigmoid
    return _differentiable(x, constant, value, sigmoid + value * (1 - sigmoid))


def gelu_approx(x: mx.array) -> mx.array:
    constant = mx.stop_gradient(x)
    scale = math.sqrt(2 / math.pi)
    t = tanh(scale * (constant + 0.044715 * constant * constant * constant))
    near = mx.clip(constant, -6, 6)  # beyond, 1 - t^2 is rounding error, and the factor would blow it up
    slope = 0.5 * (1 + t) + (0.5 * scale) * near * (1 - t * t) * (1 + 0.134145 * near * near)
    return _differentiable(x, constant, 0.5 * constant * (1 + t), slope)


@contextmanager
def vectorised() -> Iterator[None]:
    """On a CPU, mlx.nn's activations, where mlx-lm's models look them up, are these while the block runs."""
    if device() != "cpu":
        yield
        return
    theirs = {function.__name__: getattr(nn, function.__name__) for function in (silu, gelu_approx)}
    for ours in (silu, gelu_approx):
        setattr(nn, ours.__name__, _in_float32(ours, theirs[ours.__name__]))
    try:
        yield
    finally:
        for name, function in theirs.items():
            setattr(nn, name, function)


def _polynomial(coefficients: tuple[float, ...], z: mx.array) -> mx.array:
    value = coefficients[-1] * z + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * z + coefficient
    return value


def _differentiable(x: mx.array, constant: mx.array, value: mx.array, slope: mx.array) -> mx.array:
    """`value`, with `slope` as its derivative by x. (A custom function would not pass through MLX's own compile.)"""
    return value + (x - constant) * slope


def _in_float32(
    ours: Callable[[mx.array], mx.array], theirs: Callable[[mx.array], mx.array]
) -> Callable[..., mx.array]:
    return lambda x: (ours if x.dtype == mx.float32 else theirs)(x)
