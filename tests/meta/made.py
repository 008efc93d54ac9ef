"""A profile, a task and trials to recommend from, without running a model."""

from __future__ import annotations

from typing import Any

from metapeft.data.task import Example, Task
from metapeft.profiling import Profile
from metapeft.profiling.profiles import SCALES, VERSION, embed
from metapeft.profiling.shapes import Layers, Shapes
from metapeft.profiling.speed import Speed
from metapeft.training.configuration import full
from metapeft.training.trial import Score, Trial, trial_id

SMOLLM = Shapes(
    root="model.layers",
    layers=(
        Layers(
            30,
            {
                "mlp.down_proj": (576, 1536),
                "mlp.gate_proj": (1536, 576),
                "mlp.up_proj": (1536, 576),
                "self_attn.k_proj": (192, 576),
                "self_attn.o_proj": (576, 576),
                "self_attn.q_proj": (576, 576),
                "self_attn.v_proj": (192, 576),
            },
            3_540_096,
        ),
    ),
    width=576,
    kv_heads=3,
    head_width=64,
    vocabulary=49_152,
    weight_bytes=538_060_032,
)
SPEED = Speed(0.0015, 0.0035, 0.001, 0.002, 0.1, {"device": "cpu", "workers": 2})
BACKBONE, CONTENT = "smollm2-135m-instruct", "c" * 16


def task(name: str = "spam") -> Task:
    rows = tuple(Example(f"text {n}", " yes" if n % 2 else " no") for n in range(20))
    return Task(
        name, f"{name:0<16}", "classification", "accuracy", rows[:10], rows[10:14], rows[14:] * 50, ("no", "yes")
    )


def profile(name: str = "spam", untuned: float = 0.5, shapes: Shapes = SMOLLM, **features: float) -> Profile:
    measured = dict.fromkeys(SCALES, 0.1) | {
        "train_examples": 1000.0,
        "validation_examples": 150.0,
        "test_examples": 300.0,
        "prompt_tokens_mean": 40.0,
        "prompt_tokens_p90": 60.0,
        "completion_tokens_mean": 2.0,
        "completion_tokens_p90": 2.0,
        "shared_tokens": 10.0,
        "zero_shot_score": untuned,
        "zero_shot_standard_error": 0.04,
    }
    measured |= features
    version = task(name).version
    return Profile(VERSION, name, version, BACKBONE, CONTENT, measured, tuple(SCALES), embed(measured), shapes)


def trial(
    score: float | None, name: str = "spam", untuned: float | None = 0.5, status: Any = "ok", **values: Any
) -> Trial:
    """A trial of 120 steps; `values` are hyperparameters, or fields of Trial."""
    own = {key: values.pop(key) for key in list(values) if key in Trial.__dataclass_fields__ and key != "method"}
    configuration = full({"method": "lora", **values})
    seed, budget, version = own.pop("seed", 0), own.pop("budget", 120), task(name).version
    fields: dict[str, Any] = {
        "id": trial_id(name, version, BACKBONE, configuration, seed, budget, 1000),
        "task": name,
        "task_version": version,
        "backbone": BACKBONE,
        "method": configuration["method"],
        "configuration": configuration,
        "seed": seed,
        "budget": budget,
        "status": status,
        "score": None if score is None else Score("accuracy", score, 0.02, 300, 0.5),
        "untuned_score": None if untuned is None else Score("accuracy", untuned, 0.03, 300, 2.0),
        "device": "cpu",
        "started": "2026-01-01T00:00:00+00:00",
    }
    return Trial(**{**fields, **own})
