"""The priors that ship are numbers of strategies that exist."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from metapeft.data import shots
from metapeft.data.task import Kind
from metapeft.fewshot import choose
from metapeft.fewshot.strategies import METHODS, strategies
from metapeft.training.session import Session
from tests.backbones.tiny import tiny
from tests.training import made


def test_priors_are_of_strategies_that_exist() -> None:
    few = shots.draw(made.classification(), 4, 0)
    session = Session(tiny("llama"), replace(few, validation=few.train))
    names = {s.name for s in strategies(session, [], {})}
    names |= {f"{kind} {method}" for kind in ("nearest", "reptile") for method in METHODS} | {"mix lora"}
    for kind in get_args(Kind):
        found = choose.measured(kind)
        assert found and found.keys() <= names
        assert all(-1 <= prior.mean <= 1 and 0 < prior.deviation <= 1 for prior in found.values())
