"""What is tried next follows from what was tried, and everything that could pay is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.fewshot import STRATEGIES, worth
from metapeft.fewshot.choose import Held, Prior, Strategy, belief, choose, merit
from metapeft.fewshot.worth import Together
from tests.fewshot.test_choose import told

UNTUNED = told([0.2] * 16)


def together(correlation: float, names: tuple[str, ...] = ("a", "b")) -> Together:
    """All pairs alike, all as dear."""
    n = len(names)
    matrix = np.full((n, n), correlation) + (1 - correlation) * np.eye(n)
    return Together(names, matrix, np.full(n, 1 / n))


def all_tried(
    ways: list[Strategy], answered: dict[str, Held], both: Together, least: float, **priors: Prior
) -> list[str]:
    held: dict[str, Held] = {}
    while (each := worth.following(ways, held, UNTUNED, priors, both, least)) is not None:
        assert each.name not in held
        held[each.name] = answered[each.name]
    return list(held)


def test_what_gains_with_a_disappointment_is_not_tried() -> None:
    ways = [Strategy("a", {}), Strategy("b", {}), Strategy("good", {})]
    answered = {"a": Held({10: told([0.25] * 16)}), "b": Held({10: UNTUNED}), "good": Held({10: told([0.9] * 16)})}
    names = ("a", "b", "good")
    like = np.array([[1, 0.99, 0], [0.99, 1, 0], [0, 0, 1.0]])
    beliefs = {"a": Prior(0.3, 0.3), "b": Prior(0.25, 0.3), "good": Prior(0.2, 0.3)}
    for correlation, wanted in ((like, ["a", "good"]), (np.eye(3), ["a", "b", "good"])):
        both = Together(names, correlation, np.full(3, 1 / 3))
        assert all_tried(ways, answered, both, 0.02, **beliefs) == wanted


def test_what_cannot_beat_the_best_is_not_tried_and_with_zero_everything_is() -> None:
    ways = [Strategy(name, {}) for name in ("a", "b", "c")]
    answered = {name: Held({10: told([0.9] * 16)}) for name in ("a", "b", "c")}
    beliefs = {"a": Prior(0.5, 0.1), "b": Prior(0.0, 0.1), "c": Prior(0.45, 0.2)}
    both = together(0.0, ("a", "b", "c"))
    assert "b" not in all_tried(ways, answered, both, 0.02, **beliefs)
    assert sorted(all_tried(ways, answered, both, 0.0, **beliefs)) == ["a", "b", "c"]


def test_of_equals_the_cheapest_comes_first_and_one_is_always_tried() -> None:
    ways = [Strategy("a", {}), Strategy("b", {})]
    cheap = Together(("a", "b"), np.eye(2), np.array([0.8, 0.2]))
    first = worth.following(ways, {}, UNTUNED, {}, cheap)
    assert first is not None and first.name == "b"
    hopeless = {"a": Prior(-0.9, 0.01), "b": Prior(-0.9, 0.01)}
    assert worth.following(ways, {}, UNTUNED, hopeless, cheap) is not None
    assert worth.following([], {}, UNTUNED, {}, cheap) is None


def test_a_transferred_start_is_compared_before_it_is_chosen() -> None:
    ways = [Strategy("cold lora", {}), Strategy("reptile lora", {}, rival="cold lora")]
    names = ("cold lora", "reptile lora")
    beliefs = {"cold lora": Prior(0.0, 0.01), "reptile lora": Prior(0.5, 0.1)}
    held = {"reptile lora": Held({10: told([0.9] * 16)})}
    assert choose(ways[1:], held, UNTUNED, beliefs).chosen is not None
    rival = worth.following(ways, held, UNTUNED, beliefs, together(0.0, names))
    assert rival is not None and rival.name == "cold lora"
    held["cold lora"] = Held({10: told([0.3] * 16)})
    assert worth.following(ways, held, UNTUNED, beliefs, together(0.0, names)) is None


@given(
    right=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    mean=st.floats(-0.5, 0.5),
    deviation=st.floats(0.02, 0.5),
    correlation=st.floats(0.0, 0.95),
)
@settings(max_examples=60, deadline=None)
def test_a_strategy_alone_is_believed_as_in_the_choice(
    right: list[float], mean: float, deviation: float, correlation: float
) -> None:
    """And what goes together with it follows by the regression of two normals."""
    untuned, prior = told([0.2] * len(right)), Prior(mean, deviation)
    held = {"a": Held({10: told(right)})}
    found, covariance = worth.believed(["a", "b"], held, untuned, {"a": prior, "b": prior}, together(correlation))
    expected, unsure = belief(merit(told(right)) - merit(untuned), prior)
    assert found[0] == pytest.approx(expected, abs=1e-9)
    assert math.sqrt(covariance[0, 0]) == pytest.approx(unsure, abs=1e-9)
    assert found[1] == pytest.approx(mean + correlation * (expected - mean), abs=1e-9)
    assert np.linalg.eigvalsh(covariance).min() > -1e-12


def test_the_improvement_is_the_mean_above_zero() -> None:
    random = np.random.default_rng(0).standard_normal(400_000)
    for ahead, deviation in ((0.1, 0.2), (-0.2, 0.1), (0.0, 0.3), (-0.05, 0.0), (0.05, 0.0)):
        drawn = np.maximum(0, ahead + deviation * random).mean()
        assert worth.improvement(ahead, deviation) == pytest.approx(drawn, abs=1e-3)


def test_what_ships_is_a_correlation_of_strategies_that_exist() -> None:
    both = worth.measured()
    assert set(both.names) == set(STRATEGIES) and len(both.names) == len(STRATEGIES)
    assert np.allclose(both.correlation, both.correlation.T) and np.allclose(np.diag(both.correlation), 1)
    assert np.linalg.eigvalsh(both.correlation).min() > 0
    assert (both.seconds > 0).all() and both.seconds.sum() == pytest.approx(1, abs=0.1)


def test_with_zero_everything_is_tried_however_hopeless() -> None:
    ways = [Strategy("a", {}), Strategy("b", {})]
    answered = {"a": Held({10: told([0.95] * 200)}), "b": Held({10: told([0.95] * 200)})}
    beliefs = {"a": Prior(0.13, 0.1), "b": Prior(0.13, 0.1)}
    held: dict[str, Held] = {}
    while (each := worth.following(ways, held, told([0.2] * 200), beliefs, together(0.0), 0.0)) is not None:
        held[each.name] = answered[each.name]
    assert sorted(held) == ["a", "b"]
    assert all(worth.improvement(z / 100, 0.01) >= 0 for z in np.arange(-40.0, 0.0, 0.01))
