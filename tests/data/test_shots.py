"""Shots are drawn evenly, the same for the same seed, and fewer are the first of more."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.data import shots
from metapeft.errors import UserError
from metapeft.settings import DataSettings
from tests.training import made

MADE = made.classification(train=90, labels=("no", "yes", "maybe"))
TASK = replace(MADE, train=tuple({e.prompt: e for e in MADE.train}.values())[:60])


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


def written(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def test_the_labels_of_a_sorted_file_take_turns(tmp_path: Path) -> None:
    path = written(tmp_path / "sorted.jsonl", [(f"text {n}", "ham" if n < 20 else "spam") for n in range(40)])
    few = shots.read(path, DataSettings())
    assert [e.completion.strip() for e in few.train[:6]] == ["ham", "spam"] * 3


def test_what_is_held_out_is_known_in_no_other_spelling(tmp_path: Path) -> None:
    texts = [f"the text number {n}" for n in range(6)]
    rows = [(each, "ab"[n % 2]) for n, text in enumerate(texts) for each in (text, text.upper(), f" {text} ")]
    few = shots.read(written(tmp_path / "spelled.jsonl", rows), DataSettings())
    assert len(few.train) == 6 and few.notes == ("12 duplicate rows left out",)

    unclear = written(
        tmp_path / "unclear.jsonl", [*((text, "ab"[n % 2]) for n, text in enumerate(texts)), (texts[0], "b")]
    )
    few = shots.read(unclear, DataSettings())
    (place,) = (fold for fold in shots.folds(few, 3) if any(texts[0] in str(few.train[i].prompt) for i in fold))
    assert sum(texts[0] in str(few.train[i].prompt) for i in place) == 2
    twice = shots.read(written(tmp_path / "twice.jsonl", [("one", "a"), ("one", "b")]), DataSettings())
    assert shots.folds(twice, 2) == [], "nothing would be left to learn from"


def test_every_shot_may_have_a_label_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path / "intents.jsonl", [(f"text {n}", f"intent {n}") for n in range(25)])
    assert len(shots.read(path, DataSettings()).labels) == 25


def test_fewer_shots_than_a_small_file_has(tmp_path: Path) -> None:
    path = written(tmp_path / "eight.jsonl", [(f"text {n}", "ab"[n % 2]) for n in range(8)])
    assert shots.load_shots(str(path), 9, DataSettings(), 0)[1] == [
        "eight.jsonl has 8 different rows: all are learned from"
    ]
    few, notes = shots.load_shots(str(path), 5, DataSettings(), 0)
    assert (
        not notes and len(few.train) == 5 and not few.test and few.version != shots.read(path, DataSettings()).version
    )
    many = written(tmp_path / "many.jsonl", [(f"text {n}", "ab"[n % 2]) for n in range(1001)])
    with pytest.raises(UserError, match=r"1,001 rows; at most 1,000 are shots: give fewer by --shots"):
        shots.load_shots(str(many), 2000, DataSettings(), 0)
