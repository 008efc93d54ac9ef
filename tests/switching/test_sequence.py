"""Sequences of tasks: the measures on numbers known by hand, and what each way of keeping does."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from metapeft.backbones import Backbone, load
from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.peft import adapters, create
from metapeft.peft.adalora import AdaLoRA
from metapeft.runtime import mx
from metapeft.switching.sequence import KINDS, Keep, Kind, Learned, _Task, perplexity, train_sequence
from metapeft.training import trainer
from metapeft.training.session import Session
from metapeft.training.vector import leaves
from tests.backbones.tiny import tiny, tiny_folder
from tests.training import made

START = {"method": "lora", "learning_rate": 0.02, "rank": 2}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny("llama")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    second = made.classification(labels=("red", "blue", "green"), seed=1)
    return [made.classification(rest=24), second]


def test_measures_by_hand() -> None:
    found = Learned("", {}, ["a", "b", "c"], scores=[[0.8], [0.9, 0.7], [0.6, 0.65, 0.9]], perplexity=[20, 21, 25])
    assert found.average_accuracy == pytest.approx((0.6 + 0.65 + 0.9) / 3)
    assert found.backward_transfer == pytest.approx(((0.6 - 0.8) + (0.65 - 0.7)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.7 - 0.65)) / 2)
    assert found.drift == pytest.approx(0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_runs_and_a_second_call_reads(
    backbone: Backbone, tasks: list[Task], kind: Kind, tmp_path: Path
) -> None:
    first = train_sequence(backbone, tasks, START, Keep(kind), steps=8, folder=tmp_path)
    assert [len(row) for row in first.scores] == [1, 2] and len(first.perplexity) == 3
    if kind == "adapters":
        assert first.forgetting == 0 and first.drift == 0 and first.backward_transfer == 0
    else:
        assert first.perplexity[1] != first.perplexity[0]
    steps = []
    again = train_sequence(
        backbone, tasks, START, Keep(kind), steps=8, folder=tmp_path, progress=lambda n, event: steps.append(n)
    )
    assert again == first and steps == []


def test_a_sequence_goes_on_with_the_task_it_was_at(backbone: Backbone, tasks: list[Task], tmp_path: Path) -> None:
    whole = train_sequence(backbone, tasks, START, Keep("ewc"), steps=6, folder=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(number: int, event: object) -> None:
        if number == 1:
            raise Killed

    with pytest.raises(Killed):
        train_sequence(backbone, tasks, START, Keep("ewc"), steps=6, folder=tmp_path / "cut", progress=kill)
    assert len(json.loads((tmp_path / "cut" / "sequence.json").read_text())["scores"]) == 1
    cut = train_sequence(backbone, tasks, START, Keep("ewc"), steps=6, folder=tmp_path / "cut")
    assert cut.scores == whole.scores and cut.perplexity == whole.perplexity


def test_killed_while_it_is_measured_a_task_is_not_trained_again(
    backbone: Backbone, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_sequence(backbone, tasks[:2], START, Keep("naive"), steps=6, folder=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Task, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_sequence(backbone, tasks[:2], START, Keep("naive"), steps=6, folder=tmp_path / "cut")
    trained: list[int] = []
    cut = train_sequence(
        backbone,
        tasks[:2],
        START,
        Keep("naive"),
        steps=6,
        folder=tmp_path / "cut",
        progress=lambda number, _: trained.append(number),
    )
    assert set(trained) == {1} and cut.scores == whole.scores and cut.perplexity == whole.perplexity


def test_what_another_sequence_left_in_the_folder_is_not_continued(
    backbone: Backbone, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "STATE_SECONDS", 0.0)
    whole = train_sequence(backbone, tasks, START, Keep("l2"), steps=6, folder=tmp_path / "whole")

    def kill(number: int, event: dict[str, Any]) -> None:
        if number == 1 and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sequence(backbone, tasks, START, Keep("naive"), steps=6, folder=tmp_path / "cut", progress=kill)
    assert (tmp_path / "cut" / "task-1" / "state.safetensors").exists()
    found = train_sequence(backbone, tasks, START, Keep("l2"), steps=6, folder=tmp_path / "cut")
    assert found.scores == whole.scores and found.perplexity == whole.perplexity


@pytest.mark.parametrize("kind", ["l2", "ewc"])
def test_a_stronger_penalty_moves_less(backbone: Backbone, tasks: list[Task], kind: Kind, tmp_path: Path) -> None:
    moved = []
    for strength in (0.0, 1e4 if kind == "l2" else 1e6):
        folder = tmp_path / str(strength)
        train_sequence(backbone, tasks, START, Keep(kind, strength=strength), steps=6, folder=folder)
        one = _Task("s", [Session(backbone, t) for t in tasks], 1, START, Keep(kind), folder)
        before, after = (dict(leaves(one.load(n).module.trainable_parameters())) for n in (0, 1))
        weight = mx.load(str(folder / "fisher-0.safetensors")) if kind == "ewc" else dict.fromkeys(before, 1.0)
        moved.append(sum(float(mx.sum(weight[n] * (before[n] - after[n]) ** 2)) for n in before))  # type: ignore[index, call-overload]
    assert moved[1] < 0.8 * moved[0]


def test_replay_mixes_the_buffer_in(backbone: Backbone, tasks: list[Task], tmp_path: Path) -> None:
    sessions = [Session(backbone, t) for t in tasks]
    mixed = _Task("s", sessions, 1, START, Keep("replay", buffer=5), tmp_path).mixed(seed=0)
    assert mixed.train[: len(tasks[1].train)] == tasks[1].train
    assert len(mixed.train) == len(tasks[1].train) + 5
    assert set(mixed.train[-5:]) <= set(tasks[0].train)
    assert mixed.validation == tasks[1].validation


def test_perplexity_is_the_backbones(backbone: Backbone, tasks: list[Task]) -> None:
    session = Session(backbone, tasks[0])
    assert 1 < perplexity(session, None) < 1e6
    fresh = made.moved("prefix", session, 0.5)
    assert perplexity(session, fresh) != perplexity(session, None)


def test_wrong_input_is_said(backbone: Backbone, tasks: list[Task], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose from naive, replay, ewc, l2, adapters"):
        Keep("magic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="encoder"):
        train_sequence(backbone, tasks, {"method": "p_tuning"}, Keep("ewc"), steps=4, folder=tmp_path)


def test_another_metric_or_other_weights_are_another_sequence(tasks: list[Task], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    work = tmp_path / "work"
    one = train_sequence(load(str(folder)), tasks, START, steps=4, folder=work)
    other = [replace(task, metric="macro_f1") for task in tasks]
    assert train_sequence(load(str(folder)), other, START, steps=4, folder=work).id != one.id
    shutil.copy(tiny_folder("llama", seed=1) / "model.safetensors", folder / "model.safetensors")
    again = train_sequence(load(str(folder)), tasks, START, steps=4, folder=work)
    assert again.id != one.id and again.perplexity[0] != one.perplexity[0]


def test_adalora_moves_its_budget_in_the_next_task_too(backbone: Backbone, tmp_path: Path) -> None:
    tasks = [made.classification(train=24, rest=6), made.generation(train=24, rest=6, seed=1)]
    start = {"method": "adalora", "initial_rank": 4, "target_rank": 1, "learning_rate": 1e-2, "batch_size": 4}
    train_sequence(backbone, tasks, start, Keep("naive"), steps=20, folder=tmp_path)
    first, second = (adapters.load(tmp_path / f"task-{n}", backbone.model) for n in (0, 1))
    assert isinstance(first, AdaLoRA) and isinstance(second, AdaLoRA)
    new = [mx.any((second.deltas[p].e != 0) & (first.deltas[p].e == 0)).item() for p in first.deltas]
    assert any(new), "a rank that the first task gave up is used by the second"


def test_what_is_taken_over_computes_the_same(backbone: Backbone) -> None:
    at = made.session("llama")
    other = made.moved("adalora", at)
    other.detach(at.model)
    path = next(iter(other.deltas))
    for name, axis in (("a", 0), ("e", 0), ("b", 1)):  # as a trimmed one is read
        value = np.array(other.deltas[path][name])
        value[(1,) if axis == 0 else (slice(None), 1)] = 0
        other.deltas[path][name] = mx.array(value)
    fresh = create(other.config, at.model, seed=5)
    fresh.take_over(other)
    assert np.allclose(fresh.deltas[path].weight(), other.deltas[path].weight(), atol=1e-7)
    assert mx.all(fresh.deltas[path].a[1] != 0).item() and not fresh.deltas[path].e[1].item()


def test_who_has_the_same_sequence_waits(backbone: Backbone, tasks: list[Task], tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as other, FileLock(tmp_path / ".lock"):
        waiting = other.submit(train_sequence, backbone, tasks[:1], START, steps=2, folder=tmp_path)
        time.sleep(1)
        assert not waiting.done() and not (tmp_path / "sequence.json").exists()
    assert waiting.result().scores
