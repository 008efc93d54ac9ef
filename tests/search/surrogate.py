"""A small world with a known truth: what a configuration scores, takes and needs, as a deterministic function.

Learning rate has a best value per method and diverges far above it, size costs time and memory, and text initialisation
helps. `Surrogate` is picklable, so that worker processes can train in it too.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metapeft.data.task import Example, Task
from metapeft.training.trial import Score, Trial, trial_id

BEST_RATE = {"lora": 6e-4, "adalora": 3e-3, "prompt": 1.5e-2, "prefix": 8e-3, "p_tuning": 1e-3}
CEILING = {"lora": 0.93, "adalora": 0.91, "prompt": 0.82, "prefix": 0.88, "p_tuning": 0.90}
SECONDS = {"lora": 30.0, "adalora": 42.0, "prompt": 12.0, "prefix": 15.0, "p_tuning": 20.0}
MEMORY = {"lora": 900.0, "adalora": 1100.0, "prompt": 620.0, "prefix": 700.0, "p_tuning": 800.0}
UNTUNED = 0.55
BACKBONE = "surrogate"


def task(name: str = "flowers") -> Task:
    rows = tuple(Example(f"row {i}", "yes" if i % 2 else "no") for i in range(20))
    return Task(name, hashlib.sha256(name.encode()).hexdigest()[:16], "classification", "accuracy", rows, rows, rows)


def truth(configuration: dict[str, Any]) -> tuple[str, float, float, float]:
    """(status, score, seconds, MiB)"""
    method = configuration["method"]
    decades = math.log10(configuration["learning_rate"] / BEST_RATE[method])
    size = configuration.get("rank") or configuration.get("target_rank") or configuration.get("tokens", 8)
    depth = configuration.get("layers", 0) or 30
    seconds = SECONDS[method] * (0.4 + 0.6 * depth / 30) * (configuration["batch_size"] / 8) ** 0.8
    memory = MEMORY[method] * (0.5 + 0.5 * depth / 30) + 20 * configuration["batch_size"] + 4 * size
    if decades > 0.6:
        return "diverged", math.nan, seconds / 4, memory
    if memory > 1600:
        return "out_of_memory", math.nan, 1.0, memory
    score = CEILING[method] - 0.25 * decades**2 - 0.04 / size - 0.03 * (1 - depth / 30)
    score -= 0.05 * (configuration.get("initialisation") == "random")
    return "ok", max(score, 0.0), seconds, memory


def train(configuration: dict[str, Any], seed: int = 0, steps: int = 40, where: Task | None = None) -> Trial:
    where = where or task()
    status, value, seconds, memory = truth(configuration)
    digest = hashlib.sha256(repr((sorted(configuration.items()), seed)).encode()).digest()
    noise = (digest[0] / 255 - 0.5) * 0.02
    ended = status == "ok"

    def score(value: float, n: int) -> Score:
        value = min(max(value, 0.0), 1.0)
        return Score("accuracy", round(value * n) / n, math.sqrt(value * (1 - value) / n), n, 1.4 - value)

    curve = []
    for quarter in range(1, 5) if ended else range(1, 2):
        reached = value - (value - UNTUNED) * math.exp(-quarter) if ended else UNTUNED / quarter
        curve.append(
            {
                "step": steps * quarter // 4,
                "examples": steps * quarter // 4 * configuration["batch_size"],
                "seconds": seconds * quarter / 4,
                "train_loss": 1.5 - reached if ended else 9.0,
                "validation_loss": 1.4 - reached if ended else 9.0,
                "validation_score": reached,
            }
        )
    return Trial(
        id=trial_id(where.name, where.version, BACKBONE, configuration, seed, steps, len(where.train)),
        task=where.name,
        task_version=where.version,
        backbone=BACKBONE,
        method=configuration["method"],
        configuration=configuration,
        seed=seed,
        budget=steps,
        status=status,  # type: ignore[arg-type]
        score=score(value - noise / 2, 300) if ended else None,
        validation=score(value + noise, 150) if ended else None,
        untuned_score=score(UNTUNED, 300),
        curve=curve,
        seconds=seconds * 1.3,
        train_seconds=seconds,
        tokens=steps * 500,
        peak_memory_mb=memory,
        trained_parameters=1000 * int(memory),
        adapter_bytes=4000 * int(memory) if ended else 0,
        device="cpu",
        versions={"python": "3.11", "mlx": "0.32.4", "metapeft": "0.1.0"},
        started="2026-11-23T12:00:00+00:00",
        error=""
        if ended
        else {"diverged": "the loss was nan at step 10", "out_of_memory": "[malloc] no memory"}[status],
        train_examples=len(where.train),
    )


@dataclass(frozen=True)
class Surrogate:
    """A `run` that writes down who trained what in `log`, and takes `seconds` for it."""

    log: Path | None = None
    seconds: float = 0.0

    def __call__(self, configuration: dict[str, Any], seed: int, steps: int, key: str, watch: Any = None) -> Trial:
        self.note("begin", key)
        time.sleep(self.seconds)
        trial = train(configuration, seed, steps)
        self.note("end", key)
        return trial

    def note(self, event: str, key: str) -> None:
        if self.log is not None:
            with self.log.open("a") as file:  # one short line: appended whole, by several processes too
                file.write(f"{event} {key}\n")
