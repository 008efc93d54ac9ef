"""Costs: bytes to the byte against files that were saved, memory and time by their laws and against a real training."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from metapeft.backbones import Backbone
from metapeft.errors import UserError
from metapeft.meta.costs import corrected, cost, undisturbed
from metapeft.peft import adapters, create
from metapeft.profiling import profile as measure
from metapeft.profiling import speed
from metapeft.profiling.shapes import shapes
from metapeft.profiling.speed import Speed
from metapeft.training.configuration import full, split
from metapeft.training.session import Session
from metapeft.training.trainer import run_trial
from metapeft.training.trial import Trial
from tests.backbones.tiny import tiny
from tests.meta.made import SPEED, profile, trial
from tests.profiling.tasks import classification

CONFIGURATIONS: list[dict[str, Any]] = [
    {"method": "lora"},
    {"method": "lora", "rank": 3, "targets": ("q_proj", "v_proj"), "layers": 2},
    {"method": "lora", "rank": 4, "rank_pattern": {"1.self_attn.q_proj": 16, "o_proj": 2}},
    {"method": "adalora", "initial_rank": 5, "target_rank": 5, "layers": 1},
    {"method": "prompt", "tokens": 7},
    {"method": "prefix", "tokens": 5},
    {"method": "prefix", "tokens": 5, "projection": 12},
    {"method": "p_tuning", "tokens": 6, "width": 10},
    {"method": "p_tuning", "tokens": 6, "width": 10, "encoder": "lstm"},
]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: "-".join(map(str, c.values())))
def test_bytes_and_parameters_are_exact(configuration: dict[str, Any], architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture).model
    predicted = cost(configuration, profile(shapes=shapes(model)), SPEED, 40)
    method, _ = split(configuration)
    adapter = create(method, model, seed=0, text_ids=[1, 2, 3])
    adapter.attach(model)
    assert predicted.trained_parameters == sum(v.size for _, v in tree_flatten(adapter.module.parameters()))
    adapters.save(adapter, tmp_path / "adapter", {})
    adapter.detach(model)
    assert predicted.adapter_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def seconds(steps: int = 100, **configuration: Any) -> float:
    return cost(configuration, profile(), SPEED, steps).seconds


def memory(**configuration: Any) -> float:
    return cost(configuration, profile(), SPEED, 100).peak_memory_mb


def test_what_makes_a_training_slower() -> None:
    lora = seconds(method="lora")
    assert seconds(steps=200, method="lora") > 1.5 * lora
    assert seconds(method="lora", batch_size=16) > 1.5 * lora
    # The frozen trunk is computed once per example; methods that reach the lowest layer pay for all, every step.
    assert seconds(method="lora", layers=10) < 0.7 * lora
    assert seconds(method="prompt", tokens=20) > seconds(method="prefix", tokens=20) > seconds(method="lora", layers=10)
    assert seconds(method="prompt", tokens=60) > seconds(method="prompt", tokens=20)
    assert seconds(method="adalora") > lora
    assert seconds(method="lora", evaluations=8) > lora


def test_what_takes_memory() -> None:
    lora = memory(method="lora")
    assert lora > 513  # the backbone alone
    assert memory(method="lora", batch_size=32) > memory(method="lora", batch_size=16) > lora
    assert memory(method="lora", batch_size=32, accumulate=4) < memory(method="lora", batch_size=32)
    assert memory(method="lora", batch_size=32, checkpoint=True) < memory(method="lora", batch_size=32)
    assert memory(method="lora", rank=64) > lora
    assert memory(method="prompt") < lora


def test_a_wrong_configuration_is_refused() -> None:
    with pytest.raises(UserError, match="no hyperparameter"):
        seconds(method="lora", ranks=8)


@pytest.mark.slow
def test_predictions_against_a_real_training(smollm: Backbone) -> None:
    task = classification(48)
    measured = measure(task, smollm)
    session = Session(smollm, task)
    for configuration in ({"method": "lora", "layers": 10}, {"method": "prefix"}):
        configuration = {**configuration, "evaluations": 1}
        predicted = cost(configuration, measured, speed.of(smollm), 3)
        trial = run_trial(session, configuration, steps=3)
        assert predicted.peak_memory_mb == pytest.approx(trial.peak_memory_mb, rel=0.35)
        took = undisturbed(trial, speed.of(smollm))
        assert took / 3 < predicted.seconds < took * 3


HERE = Speed(*(getattr(SPEED, f.name) for f in fields(SPEED)[:5]), {"device": "cpu", "workers": 2, "processor": "X"})
LORA = full({"method": "lora"})


def test_times_of_another_backbone_or_processor_correct_nothing() -> None:
    """A speed is measured for one backbone on one processor."""
    mine = profile()
    raw = cost(LORA, mine, HERE, 120).seconds
    like: dict[str, Any] = {"seconds": 2 * raw, "peak_memory_mb": 500.0}
    own = [trial(0.7, seed=n, versions={"processor": "X"}, **like) for n in range(30)]
    elsewhere = [trial(0.7, seed=n, versions={"processor": "Y"}, **like) for n in range(150)]
    big = [replace(t, backbone="big/model") for t in own]
    known = {(mine.task_version, "big/model"): replace(mine, backbone="big/model")}

    def seconds(trials: list[Trial]) -> float:
        return corrected([LORA], mine, HERE, 120, trials, known)[0].seconds / raw

    assert seconds(own) == pytest.approx(2, rel=0.05)
    assert seconds([*own, *elsewhere]) == pytest.approx(2, rel=0.05)  # however many are newer
    assert seconds(big) == seconds(elsewhere) == 1


def test_memory_is_corrected_by_every_backbone_on_this_device() -> None:
    mine = profile()
    raw = cost(LORA, mine, HERE, 120).peak_memory_mb
    big = [replace(trial(0.7, seed=n, seconds=1.0, peak_memory_mb=2 * raw), backbone="big/model") for n in range(30)]
    known = {(mine.task_version, "big/model"): replace(mine, backbone="big/model")}
    assert corrected([LORA], mine, HERE, 120, big, known)[0].peak_memory_mb > 1.8 * raw
