"""Advice is made of an experience and a meta-model; told the basis of before, it is the same when both have grown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metapeft.meta import versions
from metapeft.meta.evidence import families
from metapeft.meta.experience import Experience
from metapeft.meta.model import Model
from metapeft.switching import advice as module
from metapeft.switching.advice import Advice, Basis, advice
from metapeft.training.configuration import full
from metapeft.training.trial import Score
from tests.meta import made as meta
from tests.switching.test_forecast import made

START = {"method": "lora", "learning_rate": 1e-3}
OPTIONS = [(START, 40), ({"method": "prefix", "learning_rate": 1e-2}, 20)]


def asked(store: Experience, basis: Basis | None = None, **more: Any) -> Advice:
    return advice(meta.task(), meta.profile(), START, 40, 0.5, store, meta.SPEED, basis=basis, **more)


def same(first: Advice, second: Advice) -> bool:
    return bool(np.array_equal(first.forecaster.before(OPTIONS).mean, second.forecaster.before(OPTIONS).mean))


def test_the_basis_of_before_gives_the_advice_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path))
    store = Experience(tmp_path / "experience", shipped=None)
    like: dict[str, Any] = {"backbone": meta.BACKBONE, "configuration": full(START)}
    store.extend([replace(t, **like) for t in made(8, 4)])
    first = asked(store)
    assert len(first.basis.trials) == 32 and first.basis.version == 0
    store.extend([replace(t, id=f"more {t.id}", **like) for t in made(12, 6)])
    new = versions._add(versions.Version(0, Model(level_scale=3.0)))
    versions.promote(new.number)
    later, again = asked(store), asked(store, first.basis)
    assert later.basis.version == new.number and len(later.basis.trials) == 32 + 72
    assert not same(first, later)
    assert again.basis == first.basis and same(first, again)
    assert again.forecaster.calibration == first.forecaster.calibration
    assert [o.configuration for o in again.others] == [o.configuration for o in first.others]


def test_of_families_left_out_nothing_counts_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_kept", {})  # `made` gives other trials the same ids
    store = Experience(tmp_path / "experience", shipped=None)
    like: dict[str, Any] = {"backbone": meta.BACKBONE, "configuration": full(START)}
    others = [replace(t, **like) for t in made(8, 4)]
    store.extend(others)
    before = asked(store)
    small = {"task": "trec6", "task_version": "another size", "train_examples": 64}
    store.extend([replace(t, id=f"small {t.id}", **like, **small) for t in made(1, 4)])
    family = families()["trec6"]
    assert not same(before, asked(store))
    left = asked(store, without={family})
    assert same(before, left) and left.basis.trials == before.basis.trials
    assert left.forecaster.calibration == before.forecaster.calibration


def test_own_trials_count_by_their_validation_score_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_kept", {})
    store = Experience(tmp_path / "experience", shipped=None)
    like: dict[str, Any] = {"backbone": meta.BACKBONE, "configuration": full(START)}
    store.extend([replace(t, **like) for t in made(8, 4)])
    before = asked(store)
    held = Score("accuracy", 0.95, 0.02, 150, 0.2)
    swept = meta.trial(0.1, validation=held, **{k: v for k, v in OPTIONS[1][0].items()}, budget=20)
    store.append(swept)
    one = asked(store)
    assert one.forecaster.before(OPTIONS).mean[1] > before.forecaster.before(OPTIONS).mean[1] + 0.05
    store.append(replace(swept, score=replace(held, value=0.9), started="2026-02-01T00:00:00+00:00"))
    assert same(one, asked(store))
