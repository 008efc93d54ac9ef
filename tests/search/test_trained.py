"""Sweeps that really train, on a tiny backbone with random weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metapeft import stages
from metapeft.meta.experience import Experience
from metapeft.settings import load_settings
from metapeft.stages.files import read_trials
from metapeft.stages.stage import read_json
from metapeft.stages.trainer import Trainer
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file
from tests.training import made

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> str:
    return str(tiny_folder("llama"))


def start(model: str, trials: int, steps: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.search.sweeping", model, str(trials), str(steps)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def said(process: subprocess.Popen[str]) -> list[list[str]]:
    assert process.stdout is not None
    return [line.split() for line in process.stdout.read().splitlines()]


def test_a_killed_trial_continues_and_does_not_restart(model: str) -> None:
    process = start(model, trials=3, steps=12)
    assert process.stdout is not None
    ended = 0
    try:
        for line in process.stdout:
            ended += line.startswith("trial")
            if ended == 1 and line.split() == ["step", "7"]:
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert ended == 1
    again = said(start(model, trials=3, steps=12))
    steps = [int(words[1]) for words in again if words[0] == "step"]
    assert 6 <= steps[0] <= 8, "from the last state, not from the beginning"
    assert steps.count(12) == 2 and steps.count(1) == 1, "the trial that had ended is not trained again"
    assert [words[2] for words in again if words[0] == "trial"] == ["ok", "ok"] and again[-1] == ["complete"]
    trials = Experience(shipped=None).trials()
    assert len(trials) == 3 and all(len(t.curve) == 4 and t.score is None and t.validation for t in trials)


def test_only_what_was_chosen_is_scored_on_the_test_split(tmp_path: Path, model: str) -> None:
    sweep = {"trials": 8, "steps": 3, "methods": ["lora", "prompt", "prefix"], "space": {"evaluations": 2}}
    settings = load_settings(task=str(spam_file(tmp_path)), backbone=model, sweep=sweep)
    stages.run(("version", "validate", "profile", "recommend", "sweep"), settings, tmp_path / "work")
    record = read_json(tmp_path / "work" / "sweep" / "sweep.json")
    trials = read_trials(tmp_path / "work" / "sweep" / "trials.jsonl")
    chosen = set(record["points"].values())
    assert chosen and {t.id for t in trials if t.score is not None} == chosen
    assert all(t.untuned_score is not None for t in trials)
    assert {t.seed for t in trials} >= {0, 1}, "a quarter of eight trials repeats the best"
    assert record["stopping"]["alpha"] == 0, "with no recorded curves nothing is stopped"
    known = {t.id: t for t in Experience(shipped=None).trials()}
    assert set(known) == {t.id for t in trials}
    assert {i for i, t in known.items() if t.score is not None} == chosen


def test_a_training_is_stopped_by_its_watch(model: str) -> None:
    seen: list[dict[str, Any]] = []

    def watch(event: dict[str, Any]) -> bool:
        seen.append(event)
        return event.get("validation_score") is not None

    train = Trainer(model, made.classification(), test=False)
    trial = train({"method": "lora", "rank": 2}, 0, 8, "watched", watch)
    assert trial.status == "stopped" and trial.curve[-1]["step"] == 2 == seen[-1]["step"]
    assert seen[-1]["peak_memory_mb"] > 0 and seen[-1]["seconds"] > 0
