"""Mixing finds weights without gradients, and never worse ones than it began with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.fewshot import mix
from metapeft.fewshot.measure import answers
from metapeft.fewshot.starts import average
from metapeft.peft import adapters
from tests.training import made


@given(target=st.lists(st.floats(-1, 1), min_size=2, max_size=4), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_it_gets_near_the_minimum_and_never_away(target: list[float], seed: int) -> None:
    goal = np.array(target)
    begins = [np.full(len(goal), 1 / len(goal)), *np.eye(len(goal))]

    def cost(point: np.ndarray) -> float:
        return float(((point - goal) ** 2).sum())

    found = [mix.minimised(cost, begins, tries, seed) for tries in (0, 30, 300)]
    costs = [cost(point) for point in found]
    assert costs[0] == min(map(cost, begins)) and costs[0] >= costs[1] >= costs[2]
    assert costs[2] < 0.05
    assert all(np.abs(point).max() <= mix.LARGEST for point in found)


def test_a_mixture_suits_the_shots_at_least_as_well_as_its_parts() -> None:
    at = made.session(task=made.classification(train=8))
    parts = []
    for scale in (0.05, 0.2):
        adapter = made.moved("lora", at, scale, rank=2)
        adapter.detach(at.model)
        parts.append(adapters.take(adapter, {}))

    def cost(weights: list[float]) -> float:
        adapter = adapters.build(average(parts, weights), at.model)
        adapter.attach(at.model)
        loss = answers(at, adapter, "train").loss.mean()
        adapter.detach(at.model)
        return float(loss) + mix.PRICE * sum(map(abs, weights))

    mixed, weights = mix.mix(at, parts, tries=6)
    assert cost(weights) <= min(map(cost, ([0.5, 0.5], [1.0, 0.0], [0.0, 1.0]))) + 1e-6
    assert mixed.config.method == "lora" and len(weights) == 2
    assert mix.mix(at, parts, tries=6)[1] == pytest.approx(weights)
