"""A report's content from the surrogate world: trials of a real sweep's kind, two of them broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metapeft.report import Content
from metapeft.search import pareto, spaces
from metapeft.training.configuration import full
from metapeft.training.trial import Trial
from tests.search import surrogate

TASK = replace(
    surrogate.task("reviews"), labels=("no", "yes"), source="a package", licence="MIT", notes=("2 rows dropped",)
)


def configurations() -> list[dict[str, Any]]:
    """All methods at and off their best learning rate, small and large; two diverge, one runs out of memory."""
    found = []
    for method, rate in surrogate.BEST_RATE.items():
        for factor in (0.3, 1.0):
            found.append({"method": method, "learning_rate": rate * factor})
    found += [{"method": "lora", "learning_rate": 6e-4, "layers": layers} for layers in (4, 10)]
    found += [{"method": "prompt", "learning_rate": 1.0}, {"method": "prefix", "learning_rate": 1.0}]
    found += [{"method": "adalora", "learning_rate": 3e-3, "batch_size": 16, "initial_rank": 99, "target_rank": 90}]
    return [full(configuration) for configuration in found]


def trials() -> list[Trial]:
    return [surrogate.train(configuration, where=TASK) for configuration in configurations()]


def recommendation() -> dict[str, Any]:
    entries = [
        {
            "rank": rank + 1,
            "method": method,
            "configuration": spaces.defaults(method),
            "score": {"mean": 0.9 - 0.05 * rank, "low": 0.8 - 0.08 * rank, "high": 0.95 - 0.02 * rank, "level": 0.9},
            "p_best": (0.5, 0.3, 0.195, 0.005)[rank],
            "p_within_1pct": 0.6,
            "seconds": 30 + 40 * rank,
            "peak_memory_mb": 800 + 300 * rank,
            "adapter_bytes": 1_500_000,
        }
        for rank, method in enumerate(("lora", "p_tuning", "prefix", "prompt"))
    ]
    return {
        "task": TASK.name,
        "basis": "experience",
        "recommendations": entries,
        "neighbours": [{"task": "flowers", "similarity": 0.83}],
    }


def content() -> Content:
    done = trials()
    broken = {trial.id: trial.status for trial in done if trial.status != "ok"}
    return Content(
        TASK,
        trials=done,
        infeasible=broken,
        final=pareto.named(done)["most accurate"],
        recommendation=recommendation(),
        profile={"features": {"mean_tokens": 31.25, "examples": 20_000, "zero_shot_loss": float("nan")}},
        validation={
            "checks": [
                {"name": "no empty text", "ok": True, "severity": "error", "detail": "all rows have text"},
                {"name": "label balance", "ok": False, "severity": "warning", "detail": "yes is 10 % of the rows"},
            ]
        },
        environment={"device": "cpu", "mlx": "0.32.4", "blas": ""},
        called="my reviews.jsonl",
        model="task-reviews, version 3",
        examples=(
            {"text": "Never again.", "expected": "no", "untuned": "yes", "tuned": "no", "right": True},
            {"text": "Long " * 200, "expected": "yes", "untuned": "", "tuned": "no", "right": False},
        ),
    )
