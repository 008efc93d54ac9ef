"""`benchmarks/sweeps.py` on an experience that is small, dense and made up."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metapeft.meta.experience import Experience
from metapeft.meta.plan import configurations
from metapeft.settings import DEFAULT_BACKBONE
from metapeft.training.configuration import full
from metapeft.training.trial import Score, Trial
from tests.search import surrogate

ROOT = Path(__file__).resolve().parents[2]


def grown(folder: Path, tasks: int) -> Path:
    """The plan's configurations on tasks whose levels, best methods and best learning rates differ somewhat."""
    trials: list[Trial] = []
    for number in range(tasks):
        random = np.random.default_rng(number)
        task = surrogate.task(f"made {number}")
        level, rate = random.uniform(-0.2, 0.0), 10 ** random.normal(0, 0.15)
        liking = {method: random.normal(0, 0.04) for method in surrogate.BEST_RATE}
        for row in configurations(30):
            chosen = full(row)
            trial = surrogate.train(chosen | {"learning_rate": chosen["learning_rate"] * rate}, where=task)
            trial = replace(trial, configuration=chosen, backbone=DEFAULT_BACKBONE, id=f"{number}{trial.id}"[:16])
            if trial.score is not None and trial.validation is not None:
                shift = level + liking[trial.method]
                trial.score, trial.validation = (moved(s, shift) for s in (trial.score, trial.validation))
                trial.curve = [
                    r | {"validation_score": min(1.0, max(0.0, r["validation_score"] + shift))} for r in trial.curve
                ]
            trials.append(trial)
    store = Experience(folder, shipped=None)
    store.extend(trials)
    store.close()
    return folder


def moved(score: Score, shift: float) -> Score:
    value = min(1.0, max(0.0, score.value + shift))
    return replace(score, value=value, standard_error=math.sqrt(value * (1 - value) / score.n))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "sweeps.py"), *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_every_strategy_is_replayed_on_tasks_left_out(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = run("--quick", "--trials", "10", "--experience", str(grown(tmp_path / "made", 9)), "--json", str(file))
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    found = json.loads(file.read_text())
    assert found["enough"] and len(found["tasks"]) == 9 and {t["trials"] for t in found["tasks"]} == {31}
    strategies = {"warm", "repeats", "cold", "tpe", "nsga2", "random", "recommended"}
    assert {(r["task"], r["strategy"]) for r in found["rows"]} == {
        (task, strategy) for task in {r["task"] for r in found["rows"]} for strategy in strategies
    }
    assert len({r["task"] for r in found["rows"]}) == 3
    for row in found["rows"]:
        count = {"recommended": 1, "warm": 20}.get(row["strategy"], 10)
        assert len(row["seconds"]) == len(row["best"]) == len(row["chosen"]) == len(row["hypervolume"]) == count
        for name in ("seconds", "best", "hypervolume"):
            assert min(np.diff(row[name]), default=0) >= -1e-12, f"{name} never falls"
        assert all(c <= b + 1e-9 for b, c in zip(row["best"], row["chosen"], strict=True))
        assert 0 <= row["false_stops"] <= row["stops"]
    early = {r["strategy"]: [] for r in found["rows"]}  # type: ignore[var-annotated]
    for row in found["rows"]:
        early[row["strategy"]].append(row["best"][min(2, len(row["best"]) - 1)])
    assert np.mean(early["warm"]) > np.mean(early["random"]), "a start from experience is worth something"
    assert len(found["targets"]) == 5 and all(t["value"] is not None or "false" in t["name"] for t in found["targets"])


def test_too_little_experience_is_said(tmp_path: Path) -> None:
    Experience(tmp_path / "empty", shipped=None).extend([surrogate.train(full({"method": "lora"}))])
    file = tmp_path / "found.json"
    done = run("--quick", "--experience", str(tmp_path / "empty"), "--json", str(file))
    assert done.returncode == 1 and "too little experience" in done.stderr and "Traceback" not in done.stderr
    found = json.loads(file.read_text())
    assert not found["enough"] and found["rows"] == [] and not any(t["met"] for t in found["targets"])
