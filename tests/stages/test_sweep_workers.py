"""A sweep that several processes share ends as one that a single process runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metapeft import stages
from metapeft.settings import Settings, load_settings
from metapeft.stages import sweep_plan, sweep_worker
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file

ROOT = Path(__file__).resolve().parents[2]
BEFORE = ("version", "validate", "profile", "recommend")


def small(folder: Path, trials: int = 5, steps: int = 2) -> Settings:
    sweep = {"trials": trials, "steps": steps, "workers": 1}
    return load_settings(task=str(spam_file(folder)), backbone=str(tiny_folder("llama")), sweep=sweep)


def told(work: Path) -> list[dict[str, Any]]:
    """What a trial came to, without what no two runs share."""
    lines = (work / "sweep" / "trials.jsonl").read_text().splitlines()
    changing = ("started", "seconds", "train_seconds", "cpu_seconds", "peak_memory_mb", "curve")
    changing += ("score",)  # of the fastest, …
    trials = [json.loads(line) for line in lines]
    return sorted(({k: v for k, v in t.items() if k not in changing} for t in trials), key=lambda trial: trial["id"])


def test_workers_end_where_the_stage_alone_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path)  # five trials: the first recommended configuration of each method
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    stages.run((*BEFORE, "sweep"), settings, alone)

    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "other home"))
    stages.run(BEFORE, settings, shared)
    plan = sweep_plan.run(settings, shared, workers=2).summary
    assert plan == [["--worker", "1 of 2"], ["--worker", "2 of 2"]]
    first = sweep_worker.run(settings, shared, "sweep 1 of 2").summary["trials"]
    assert len(first) == 5
    assert sweep_worker.run(settings, shared, "sweep 2 of 2").summary["trials"] == []
    assert sweep_plan.run(settings, shared, workers=2).summary == [], "a cleared plan starts nothing in vain"
    gathered = stages.get("sweep").run(settings, shared)
    assert gathered.summary["reused"] == 5 and gathered.summary["complete"]
    assert told(shared) == told(alone)
    assert sweep_plan.run(settings, shared, workers=2).cached

    from metapeft.tracking.compare import compare

    assert sorted(row["trial"] for row in compare(settings)) == sorted(first), "each trial is one run"


def test_workers_and_the_stage_share_one_time(tmp_path: Path) -> None:
    settings, work = small(tmp_path), tmp_path / "work"
    limited = settings.model_copy(update={"sweep": settings.sweep.model_copy(update={"max_seconds": 0.05})})
    stages.run(BEFORE, limited, work)
    assert len(sweep_plan.run(limited, work, workers=2).summary) == 2
    trained = [t for _ in range(2) for t in sweep_worker.run(limited, work).summary["trials"]]
    gathered = stages.get("sweep").run(limited, work)
    assert (len(trained), gathered.summary["trials"], gathered.summary["complete"]) == (1, 1, False)
    assert gathered.warnings == [
        "ended at its time limit of 0.05 s with 1 of 5 trials; a higher sweep.max_seconds (--max-seconds) goes on"
    ]
    again = limited.model_copy(update={"sweep": settings.sweep.model_copy(update={"max_seconds": 0.06})})
    assert stages.get("sweep").run(again, work).summary["trials"] == 2, "a command of its own has its own time"


def process(module: str, settings: Settings, work: Path, *more: str) -> subprocess.Popen[str]:
    given = {"task": settings.task, "backbone": settings.backbone}
    given |= {"sweep.trials": settings.sweep.trials, "sweep.steps": settings.sweep.steps}
    words = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return subprocess.Popen(
        [sys.executable, "-m", f"metapeft.stages.{module}", "--work", str(work), *words, *more],
        env={**os.environ, "PYTHONPATH": str(ROOT), "METAPEFT_PARENT": str(os.getpid())},
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_dies_loses_nothing(tmp_path: Path, number: int) -> None:
    """Two workers, one of them killed in the middle; the stage then gathers, and every trial counts once."""
    settings = small(tmp_path, trials=6, steps=8)
    work = tmp_path / "work"
    stages.run(BEFORE, settings, work)
    planned = process("sweep_plan", settings, work, "--workers", "2").communicate(timeout=120)[0]
    plan = json.loads(planned.splitlines()[-1])
    workers = [process("sweep_worker", settings, work, *arguments) for arguments in plan]
    assert len(workers) == 2
    assert workers[0].stderr is not None
    for line in workers[0].stderr:
        if line.startswith("sweep 1 of 2: trial"):
            os.killpg(workers[0].pid, number)
            break
    else:
        raise AssertionError("the first worker trained nothing")
    assert workers[0].wait(timeout=60) == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    _, err = workers[1].communicate(timeout=180)
    assert workers[1].returncode == 0, err
    gathered = stages.get("sweep").run(settings, work).summary
    trials = told(work)
    assert gathered["complete"] and len(trials) == 6 == len({trial["id"] for trial in trials})
    assert {trial["status"] for trial in trials} <= {"ok", "diverged"}
