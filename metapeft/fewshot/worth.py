"""Which strategy is worth trying next on these shots, by what the tried ones say of the others.

Strategies gain together: where the shots in the context do nothing, training that goes on from them seldom does. Their
gains on a new task are one Gaussian, the priors with the correlations that earlier tasks showed, conditioned on what
the tried ones gained on held-out shots. The next is the one whose expected improvement on the best of these (Jones et
al. 1998, doi:10.1023/A:1008306431147) is largest for its seconds. Where that of none is LEAST the others stay untried.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from metapeft.fewshot.choose import MEASURED, UNKNOWN, Held, Prior, Strategy, choose, merit, variance
from metapeft.fewshot.measure import Answers

LEAST = 0.02  # of the answers


@dataclass(frozen=True)
class Together:
    """names: of the n strategies that were measured. correlation: of their gains on a task, (n, n). seconds: of trying
    each, over those of all together, (n,)."""

    names: tuple[str, ...]
    correlation: np.ndarray
    seconds: np.ndarray


@cache
def measured() -> Together:
    """What benchmarks/fewshot.py measured (see docs/fewshot.md)."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))["together"]
    return Together(tuple(found["names"]), np.array(found["correlation"]), np.array(found["seconds"]))


def following(
    strategies: Sequence[Strategy],
    held: Mapping[str, Held],
    untuned: Answers,
    priors: Mapping[str, Prior],
    together: Together,
    least: float = LEAST,
) -> Strategy | None:
    """The strategy to try next; None: no other is worth it.

    held: of those that were tried. untuned, priors: as for `choose`. least: improvement that is worth trying; 0 has all
    of them tried. What `uncompared` says comes last.
    """
    names = [s.name for s in strategies]
    mean, covariance = believed(names, held, untuned, priors, together)
    seconds = dict(zip(together.names, together.seconds, strict=True))
    usual = float(np.mean(together.seconds)) if len(together.seconds) else 1.0
    chosen = choose([s for s in strategies if s.name in held], held, untuned, priors).chosen
    best = None if chosen is None else names.index(chosen.strategy)  # None: the untuned backbone, which gains nothing
    gains = {}
    for place, name in enumerate(names):
        ahead, spread = mean[place], covariance[place, place]
        if best is not None:
            ahead = ahead - mean[best]
            spread = spread + covariance[best, best] - 2 * covariance[place, best]
        gains[name] = improvement(float(ahead), math.sqrt(max(0.0, float(spread))))
    worthy = [s for s in strategies if s.name not in held and (not held or gains[s.name] >= least)]
    if worthy:
        return max(worthy, key=lambda s: gains[s.name] / seconds.get(s.name, usual))
    return uncompared(strategies, held, untuned, priors)


def uncompared(
    strategies: Sequence[Strategy], held: Mapping[str, Held], untuned: Answers, priors: Mapping[str, Prior]
) -> Strategy | None:
    """The cold training that the present choice, a transferred start, was not compared with yet."""
    chosen = choose([s for s in strategies if s.name in held], held, untuned, priors).chosen
    rivals = {s.name: s.rival for s in strategies if chosen is not None and s.name == chosen.strategy}
    return next((s for s in strategies if s.name not in held and s.name in rivals.values()), None)


def believed(
    names: Sequence[str],
    held: Mapping[str, Held],
    untuned: Answers,
    priors: Mapping[str, Prior],
    together: Together,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (names,) and covariance (names, names) of the strategies' gains, given what the tried ones gained."""
    beliefs = [priors.get(name, UNKNOWN) for name in names]
    mean, deviation = np.array([b.mean for b in beliefs]), np.array([b.deviation for b in beliefs])
    place = {name: i for i, name in enumerate(together.names)}
    correlation = np.eye(len(names))
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            if i != j and one in place and other in place:
                correlation[i, j] = together.correlation[place[one], place[other]]
    covariance = correlation * np.outer(deviation, deviation)
    tried = [i for i, name in enumerate(names) if name in held]
    if not tried:
        return mean, covariance
    differences = [merit(held[names[i]].answers[held[names[i]].best()]) - merit(untuned) for i in tried]
    seen = np.array([d.mean() for d in differences])
    noise = np.diag([variance(d) for d in differences])
    weights = np.linalg.solve(covariance[np.ix_(tried, tried)] + noise, covariance[tried]).T
    return mean + weights @ (seen - mean[tried]), covariance - weights @ covariance[tried]


def improvement(ahead: float, deviation: float) -> float:
    """The mean of what lies above zero, of a normal with this mean and deviation."""
    if deviation <= 1e-12:
        return max(0.0, ahead)
    z = ahead / deviation
    above = 0.5 * math.erfc(-z / math.sqrt(2))
    return max(0.0, ahead * above + deviation * math.exp(-z * z / 2) / math.sqrt(2 * math.pi))
