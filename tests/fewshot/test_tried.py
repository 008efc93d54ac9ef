"""A killed `adapt` goes on after the strategies that it had tried, and comes to the same."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metapeft.data import shots
from metapeft.fewshot import adapt as adapting
from metapeft.fewshot import tried
from metapeft.fewshot.adapt import adapt
from metapeft.fewshot.choose import Held, Prior, Strategy
from metapeft.fewshot.measure import Answers
from metapeft.settings import home
from tests.backbones.tiny import tiny
from tests.training import made

TASK = replace(made.classification(), name="mine")
ASKED = ["context", "cold lora", "cold prefix"]
LIKED = {name: Prior(0.3, 0.3) for name in ASKED}


def found() -> list[Path]:
    return sorted((home() / "adapting").glob("*"))


def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    answers = {step: Answers(np.array([0.0, 1.0, 1.0]), random.random(3), random.random(3) * 9) for step in (0, 10)}
    path = tmp_path / "x" / "y.json"
    assert tried.read(path) is None
    tried.write(path, Held(answers, 1.25))
    again = tried.read(path)
    assert again is not None and again.seconds == 1.25 and list(again.answers) == [0, 10]
    for step, each in answers.items():
        for name in ("hit", "right", "loss"):
            assert np.array_equal(getattr(again.answers[step], name), getattr(each, name))
    text = path.read_text()
    for damaged in ("", text[:40], "null", "[]", '{"answers": 3}', text.replace("1.25", '"x"')):
        path.write_text(damaged)
        assert tried.read(path) is None


def test_other_shots_settings_seeds_and_starts_are_other_files() -> None:
    few, way = shots.draw(TASK, 4, 0), Strategy("nearest lora", {"rank": 2}, made_of="a")
    places = [
        tried.place(few, "model", way, 0),
        tried.place(shots.draw(TASK, 4, 1), "model", way, 0),
        tried.place(few, "other", way, 0),
        tried.place(few, "model", way, 1),
        tried.place(few, "model", replace(way, configuration={"rank": 4}), 0),
        tried.place(few, "model", replace(way, made_of="b"), 0),
    ]
    assert len(set(places)) == len(places)
    assert places[0] == tried.place(replace(few, name="x"), "model", way, 0)


def test_what_belongs_to_other_shots_stays_for_a_month() -> None:
    few, other, way = shots.draw(TASK, 4, 0), shots.draw(TASK, 4, 1), Strategy("context")
    mine, theirs, old = tried.place(few, "m", way, 0), tried.place(other, "m", way, 0), tried.folder() / "old.json"
    for path in (mine, theirs, old):
        tried.write(path, Held({0: Answers(np.ones(1), np.ones(1), np.zeros(1))}, 1.0))
    os.utime(old, (0, time.time() - tried.KEPT - 60))
    tried.clear(few, "m", 0)
    assert found() == [theirs]


def test_one_that_was_killed_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = tiny("llama")
    few = shots.draw(TASK, 4, 0)
    whole = adapt(few, backbone, only=ASKED, priors=LIKED)
    tried.clear(few, backbone.identity, 0)
    asked: list[str] = []

    def counted(strategy: Strategy, *rest: Any, **options: Any) -> Held:
        asked.append(strategy.name)
        return cross_validate(strategy, *rest, **options)

    def killed(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    cross_validate = adapting.cross_validate
    monkeypatch.setattr(adapting, "cross_validate", counted)
    with pytest.raises(KeyboardInterrupt):
        adapt(few, backbone, only=ASKED, priors=LIKED, report=killed)
    first = list(asked)
    assert len(first) == len(found()) == 2
    again = adapt(few, backbone, only=ASKED, priors=LIKED)
    assert sorted(asked) == sorted(ASKED) and asked[:2] == first, "each was tried once"
    assert again.adapter == whole.adapter and again.score == whole.score
    assert [replace(j, seconds=0.0) for j in again.judged] == [replace(j, seconds=0.0) for j in whole.judged]
