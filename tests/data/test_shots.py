"""Shots are drawn evenly, the same for the same seed, and fewer are the first of more."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.data import shots
from metapeft.errors import UserError
from metapeft.settings import DataSettings
from tests.training import made

TASK = made.classification(train=60, labels=("no", "yes", "maybe"))


@given(count=st.integers(1, 60), more=st.integers(0, 20), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_drawn_evenly_and_nested(count: int, more: int, seed: int) -> None:
    few, many = shots.draw(TASK, count, seed), shots.draw(TASK, min(60, count + more), seed)
    assert len(few.train) == count and few.train == many.train[:count]
    assert few.train == shots.draw(TASK, count, seed).train
    assert Counter(few.train) <= Counter(TASK.train)
    have, drawn = (Counter(e.completion for e in task.train) for task in (TASK, few))
    most = max(drawn.values())
    assert all(drawn[label] >= min(have[label], most - 1) for label in have)
    assert (few.validation, few.test) == (TASK.validation, TASK.test)
    assert (few.version == many.version) == (few.train == many.train)


def test_seeds_differ_and_too_many_are_refused() -> None:
    assert len({shots.draw(TASK, 4, seed).train for seed in range(5)}) > 1
    for count in (0, 61):
        with pytest.raises(UserError, match="60 training examples"):
            shots.draw(TASK, count, 0)


@given(count=st.integers(2, 40), folds=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_every_shot_is_held_out_once(count: int, folds: int) -> None:
    few = shots.draw(TASK, count, 0)
    held = shots.folds(few, folds)
    assert sorted(i for fold in held for i in fold) == list(range(count))
    assert len(held) == min(folds, count) and max(map(len, held)) - min(map(len, held)) <= 1
    for label in few.labels:
        spread = [sum(few.train[i].completion.strip() == label for i in fold) for fold in held]
        assert max(spread) - min(spread) <= 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for count in (None, 4):
        with pytest.raises(UserError, match=r"none\.jsonl") as said:
            shots.load_shots(str(tmp_path / "none.jsonl"), count, DataSettings(), 0)
        assert "--shots" not in str(said.value)


def test_every_row_of_a_file_is_a_shot(tmp_path: Path) -> None:
    path = tmp_path / "four.jsonl"
    rows = [{"text": f"number {n}", "label": "odd" if n % 2 else "even"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    task = shots.read(path, DataSettings())
    assert shots.rows(path) == 4 and len(task.train) == 4 and not task.validation and not task.test
    assert (task.name, task.kind, task.metric, task.labels) == ("four", "classification", "accuracy", ("even", "odd"))
    assert {e.completion.strip() for e in shots.spelled(task)} == {"even", "odd"}
