"""Reptile goes on where it was stopped or killed, and what it learns is an ordinary sealed adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metapeft.errors import UserError
from metapeft.fewshot import reptile
from metapeft.fewshot.train import digest
from metapeft.peft import adapters
from metapeft.training.evaluation import predict
from metapeft.training.session import Session
from tests.backbones.tiny import tiny
from tests.training import made

TASKS = [replace(made.classification(seed=n), name=f"t{n}", family="made", licence="MIT") for n in range(2)]
LORA = {"method": "lora", "rank": 2, "layers": 2, "learning_rate": 1e-2}


def learned(folder: Path, rounds: int, **options: object) -> reptile.Learned:
    given = {"inner": 2, "configuration": LORA, **options}
    return reptile.reptile(tiny("llama"), TASKS, rounds=rounds, folder=folder, **given)  # type: ignore[arg-type]


def test_stopped_and_started_again_it_ends_the_same(tmp_path: Path) -> None:
    whole = learned(tmp_path / "whole", 5)
    assert (whole.rounds, whole.tasks, whole.families) == (5, ("t0", "t1"), ("made",))
    cut = learned(tmp_path / "cut", 5, report=lambda number, loss: number == 2)
    assert cut.rounds == 2 and digest(cut.saved) != digest(whole.saved)
    again = learned(tmp_path / "cut", 5)
    assert again.rounds == 5 and digest(again.saved) == digest(whole.saved)
    assert digest(learned(tmp_path / "cut", 5).saved) == digest(whole.saved), "nothing is left to do"


def test_one_that_goes_on_with_other_tasks_has_learned_from_the_earlier_ones_too(tmp_path: Path) -> None:
    learned(tmp_path / "a", 2)
    others = [replace(made.classification(seed=5), name="t5", family="other", licence="CC0")]
    found = reptile.reptile(tiny("llama"), others, LORA, rounds=3, folder=tmp_path / "a", inner=2)
    assert (found.tasks, found.families) == (("t0", "t1", "t5"), ("made", "other"))
    assert found.saved.metadata["reptile"]["licences"] == {"t0": "MIT", "t1": "MIT", "t5": "CC0"}


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_the_start_is_better_than_none_on_another_task_of_the_kind(method: str, tmp_path: Path) -> None:
    configuration = LORA if method == "lora" else {"method": method, "tokens": 4, "learning_rate": 2e-2}
    found = learned(tmp_path / "start", 24, configuration=configuration, inner=4)
    other = Session(tiny("llama"), made.classification(seed=7))
    before = predict(other, None, "test").loss_sum.mean()
    adapter = adapters.load(tmp_path / "start", other.model)
    adapter.attach(other.model)
    after = predict(other, adapter, "test").loss_sum.mean()
    adapter.detach(other.model)
    assert after < before
    assert found.saved.metadata["reptile"]["licences"] == {"t0": "MIT", "t1": "MIT"}


def test_a_part_of_the_way(tmp_path: Path) -> None:
    one, two = learned(tmp_path / "a", 1).saved, learned(tmp_path / "b", 2).saved
    for part in (0.0, 0.5, 1.0):
        between = reptile.toward(one, two, part)
        for name, value in between.tensors.items():
            expected = (1 - part) * np.array(one.tensors[name]) + part * np.array(two.tensors[name])
            np.testing.assert_allclose(np.array(value), expected, atol=1e-6)


def test_without_tasks_there_is_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tasks .*`metapeft train NAME`.*--tasks"):
        reptile.reptile(tiny("llama"), [], LORA, rounds=1, folder=tmp_path / "x")
    assert reptile.read(tmp_path / "x") is None
