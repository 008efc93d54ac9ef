"""The defaults are real configurations, of every method, with several learning rates each."""

from __future__ import annotations

import pytest

from metapeft.meta.portfolio import PORTFOLIO, portfolio
from metapeft.peft import METHODS
from metapeft.peft.matrices import linear_layers
from metapeft.training.configuration import full, split
from tests.backbones.tiny import tiny


@pytest.mark.parametrize("depth", [1, 2, 4, 30])
def test_every_default_can_be_trained_on_a_backbone_of_any_depth(depth: int) -> None:
    chosen = portfolio(depth)
    assert len({repr(sorted(full(c).items())) for c in chosen}) == len(chosen)
    for configuration in chosen:
        method, _ = split(configuration)
        assert 0 <= getattr(method, "layers", 0) <= depth
    if depth == 4:
        model = tiny("llama").model
        assert all(linear_layers(model, layers=c.get("layers", 0)) for c in chosen)


def test_every_method_has_several_learning_rates() -> None:
    for method in METHODS:
        rates = {d.configuration["learning_rate"] for d in PORTFOLIO if d.configuration["method"] == method}
        assert len(rates) >= 2


def test_beliefs_are_in_order_and_modest() -> None:
    gains = [d.gain for d in PORTFOLIO]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 0 and gains[0] < 0.7
    assert {d.configuration["method"] for d in PORTFOLIO[:6]} >= {"lora", "prefix", "adalora", "prompt"}
