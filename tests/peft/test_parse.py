"""Hyperparameters of methods: what is refused, in a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from metapeft.errors import UserError
from metapeft.peft import parse


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("lora", {"rnk": 4}, "lora has no hyperparameter 'rnk'"),
        ("lora", {"rank": 0}, "rank=0 must be at least 1"),
        ("lora", {"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj=0 must be at least 1"),
        ("lora", {"rank_pattern": {"q_proj": -1}}, "rank_pattern: q_proj=-1 must be at least 1"),
        ("lora", {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ("prefix", {"tokens": "many"}, "prefix hyperparameter tokens='many'"),
    ],
)
def test_wrong_values_are_named(method: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(method, values)
