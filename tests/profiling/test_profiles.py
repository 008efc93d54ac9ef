"""Profiles are deterministic, complete, and measured once per content."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from metapeft import profiling
from metapeft.backbones import Backbone
from metapeft.data.task import Example, Task
from metapeft.errors import UserError
from metapeft.profiling import Profile, every_profile, profile, profiles
from tests.backbones.tiny import CONTEXT, tiny
from tests.profiling.tasks import chat, classification, generation


@pytest.fixture(scope="module")
def llama() -> Backbone:
    return tiny("llama")


@pytest.mark.parametrize("task", [classification(), generation(), chat()])
def test_a_profile_is_complete_finite_and_json(llama: Backbone, task: Task) -> None:
    found = profile(task, llama)
    assert found.task == task.name and found.task_version == task.version and found.backbone == llama.id
    assert len(found.names) == len(found.embedding) and set(found.names) <= set(found.features)
    assert all(math.isfinite(v) for v in (*found.features.values(), *found.embedding))
    assert Profile.from_json(json.loads(json.dumps(found.to_json()))) == found
    for name in ("train_examples", "label_entropy", "zero_shot_loss", "domain_00"):
        assert name in found.features
    assert found.features["zero_shot_loss"] > 0
    if task.kind == "generation":
        assert found.features["probe_accuracy"] == found.features["labels"] == 0


def test_it_is_measured_once_and_the_same_every_time(
    llama: Backbone, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = classification()
    first = profile(task, llama)
    assert profiles.measure(task, llama) == first
    with monkeypatch.context() as patch:
        patch.setattr(profiles, "measure", pytest.fail)
        renamed = profile(replace(task, name="other name"), llama)
    assert renamed == replace(first, task="other name")
    (path,) = (home / "profiles").glob("*.json")
    path.write_text(path.read_text()[:100])  # as a full disk would leave it
    assert profile(task, llama) == first
    assert own_profiles() == [first]
    assert not list((home / "profiles").glob(".*"))


def test_a_file_of_another_task_is_not_believed(llama: Backbone, home: Path) -> None:
    mine, other = classification(), classification(seed=1)
    first, second = profile(mine, llama), profile(other, llama)
    paths = sorted((home / "profiles").glob("*.json"))
    texts = [path.read_text() for path in paths]
    for path, text in zip(paths, reversed(texts), strict=True):
        path.write_text(text)
    assert own_profiles() == [], "known by no name, rather than by a wrong one"
    assert profile(mine, llama) == first and profile(other, llama) == second
    assert [path.read_text() for path in paths] == texts, "and what is measured again is kept"


def test_other_data_other_metric_other_backbone_are_other_profiles(llama: Backbone) -> None:
    task = classification()
    base = profile(task, llama)
    assert profile(classification(seed=1), llama).embedding != base.embedding
    assert profile(task, tiny("llama", seed=1)).features["zero_shot_loss"] != base.features["zero_shot_loss"]
    assert profile(replace(task, metric="macro_f1"), llama).embedding != base.embedding
    assert len(own_profiles()) == 3


def test_of_two_metrics_the_usual_one_is_what_is_known_of_a_task(llama: Backbone) -> None:
    task = classification()
    usual, other = profile(task, llama), profile(replace(task, metric="macro_f1"), llama)
    assert usual.features != other.features and own_profiles() == [usual]


def test_rows_that_cannot_be_profiled(llama: Backbone) -> None:
    task = classification()
    with pytest.raises(UserError, match="no training rows"):
        profile(replace(task, train=()), llama)
    long = Example("word " * CONTEXT, " ham")
    with pytest.raises(UserError, match=f"context of {CONTEXT}"):
        profile(replace(task, train=(long, *task.train), version="l" * 16), llama)


def test_an_unwritable_home_is_a_clear_error(llama: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="METAPEFT_HOME"):
        profile(classification(), llama)


def test_one_row_is_enough(llama: Backbone) -> None:
    task = classification()
    found = profiling.profile(replace(task, train=task.train[:1], version="1" * 16), llama)
    assert found.features["train_examples"] == 1 and found.features["probe_accuracy"] == 0


@pytest.mark.slow
def test_the_real_backbone_reads_a_real_difference(smollm: Backbone) -> None:
    found = profile(classification(48), smollm).features
    assert found["probe_accuracy"] > 0.8 and found["neighbour_disagreement"] < 0.3
    assert 0.2 < found["zero_shot_score"] < 1 and found["words_english"] > 0.1


def own_profiles() -> list[Profile]:
    """Without those that ship."""
    shipped = {path.name.split("-")[0] for path in profiles.SHIPPED.glob("*.json")}
    return [found for (version, _), found in every_profile().items() if version not in shipped]
