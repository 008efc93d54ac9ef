"""Prices: the cost model as a line in steps and looks."""

from __future__ import annotations

import numpy as np
import pytest

from metapeft.meta.costs import cost
from metapeft.peft import METHODS
from metapeft.switching.prices import Price, prices
from tests.meta.made import SPEED, profile


@pytest.mark.parametrize("method", METHODS)
def test_a_price_is_what_the_cost_model_says_without_the_test_split(method: str) -> None:
    about = profile()
    untested = profile()
    untested.features["test_examples"] = 0
    [price] = prices([{"method": method}], about, SPEED, [], {})
    for steps, looks in ((30, 4), (200, 6)):
        expected = cost({"method": method, "evaluations": looks}, untested, SPEED, steps).seconds
        assert price.seconds(steps, looks) == pytest.approx(expected, rel=1e-6)


def test_steps_are_what_seconds_pay_for() -> None:
    price = Price(2.0, 0.5, 1.0, 0.5)
    assert price.steps(price.seconds(17, 3) + 0.1, 3) == price.steps(price.seconds(17, 3), 3) == 17
    random = np.random.default_rng(0)
    for once, step, look in random.uniform(0.001, 3, size=(500, 3)):
        drawn = Price(once, step, look)
        assert all(drawn.steps(drawn.seconds(n, 4), 4) == n for n in (1, 20, 40, 60, 120))
    assert price.steps(1.0, 3) <= 0
    assert price.exchange("distilled") > price.exchange("fresh") > price.exchange("frozen") > 0
    assert price.exchange("frozen") == price.exchange("converted")
    assert price.exchange("") == 0


@pytest.mark.parametrize(("examples", "looks"), [(10, 2.0), (16, 2.0), (32, 1.0), (64, 0.5), (500, 0.5)])
def test_confirming_that_outputs_stayed_costs_the_examples_that_it_asks(examples: int, looks: float) -> None:
    about = profile()
    about.features["validation_examples"] = float(examples)
    [price] = prices([{"method": "lora"}], about, SPEED, [], {})
    assert price.confirm == pytest.approx(looks * price.look)
