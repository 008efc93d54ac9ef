"""The main job through the command line, on a file the project has never seen and a tiny backbone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metapeft import cli
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"score", "untuned_score", "seconds", "peak_memory_mb", "adapter", "method", "configuration", "status"}


class Shell:
    """Commands of one user: one home, one folder, in this process."""

    def __init__(self, folder: Path):
        self.task = spam_file(folder)
        self.common = ["--backbone", str(tiny_folder("llama"))]

    def json(self, *words: object) -> Any:
        import contextlib
        import io

        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = cli.main([*map(str, words), "--json"])
        assert code == 0
        return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("user"))


@pytest.fixture(autouse=True)
def home(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One home for this module: its tests are one story (and each still runs alone)."""
    monkeypatch.chdir(shell.task.parent)
    monkeypatch.setenv("METAPEFT_HOME", str(shell.task.parent / "home"))
    yield shell.task.parent / "home"


def sweep(shell: Shell) -> Any:
    return shell.json(
        "sweep", shell.task, *shell.common, "--trials", 3, "--steps", 2, "--method", "lora", "--method", "prompt"
    )


def train(shell: Shell) -> Any:
    return shell.json("train", shell.task, *shell.common, "--method", "lora", "--set", "rank=4", "--steps", 3)


def test_profile(shell: Shell) -> None:
    found = shell.json("profile", shell.task, *shell.common)
    assert found["features"]["labels"] == 2 and len(found["embedding"]) == len(found["names"])


def test_recommend_has_the_agreed_shape(shell: Shell) -> None:
    found = shell.json("recommend", shell.task, *shell.common)
    assert set(found) >= {"task", "basis", "recommendations", "neighbours"}
    assert found["task"] == "spam" and found["basis"] in ("portfolio", "experience")
    ranks = [entry["rank"] for entry in found["recommendations"]]
    assert ranks == list(range(1, len(ranks) + 1)) and len({e["method"] for e in found["recommendations"]}) == 5
    for entry in found["recommendations"]:
        assert set(entry) >= {
            *("rank", "method", "configuration", "score", "p_best", "p_within_1pct"),
            *("seconds", "peak_memory_mb", "adapter_bytes"),
        }
        score = entry["score"]
        assert set(score) == {"mean", "low", "high", "level"} and score["low"] <= score["mean"] <= score["high"]


def test_preferences_and_limits_change_the_recommendation(shell: Shell) -> None:
    everything = shell.json("recommend", shell.task, *shell.common)["recommendations"]
    least = min(entry["peak_memory_mb"] for entry in everything)
    most = max(entry["peak_memory_mb"] for entry in everything)
    limit = (least + most) / 2
    limited = shell.json("recommend", shell.task, *shell.common, "--max-memory-mb", limit)["recommendations"]
    assert 0 < len(limited) < len(everything)
    assert all(entry["peak_memory_mb"] <= limit for entry in limited)
    assert cli.main(["recommend", str(shell.task), *shell.common, "--max-memory-mb", "0.001"]) == 2


def test_sweep_prints_trials_and_continues(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    found = sweep(shell)
    assert len(found["trials"]) == 3 and found["front"] and found["complete"]
    for trial in found["trials"]:
        assert set(trial) >= FIELDS and trial["method"] in ("lora", "prompt")
        assert Path(trial["adapter"]).is_dir() or trial["status"] != "ok"
    again = sweep(shell)
    assert again["trials"] == found["trials"] and again["reused"] == 3
    assert "reused: " in capsys.readouterr().err


def test_train_registers_what_it_trained(shell: Shell) -> None:
    trial = train(shell)
    assert set(trial) >= FIELDS and trial["status"] == "ok" and trial["configuration"]["rank"] == 4
    assert trial["score"]["n"] == trial["untuned_score"]["n"] > 0
    assert (Path(trial["adapter"]) / "adapter_model.safetensors").is_file()
    assert train(shell) == trial, "nothing has changed, so nothing ran"
    (model,) = [m for m in shell.json("models", "list") if m["trial"] == trial["id"]]
    assert model["method"] == "lora" and model["score"] == trial["score"]["value"]
    assert model["task_version"] == trial["task_version"] and model["dvc_id"]
    shown = shell.json("models", "promote", "spam", model["version"])
    assert "champion" in shown["aliases"]
    assert trial["id"] in {row["trial"] for row in shell.json("compare")}


def test_train_without_a_method_takes_the_best_of_the_sweep(shell: Shell) -> None:
    swept = sweep(shell)
    trial = shell.json("train", shell.task, *shell.common, "--steps", 2)
    best = {t["id"]: t for t in swept["trials"]}[swept["points"]["balanced"]]
    assert trial["configuration"] == best["configuration"] | {"evaluations": 4}  # a short trial looks more seldom


def test_experience_moves_between_homes(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(shell)
    listed = shell.json("experience", "list")
    assert all(trial["status"] and trial["task_version"] for trial in listed)
    known = [trial for trial in listed if trial["task"] == "spam"]  # without what ships
    file = tmp_path / "trials.parquet"
    assert shell.json("experience", "export", file)["trials"] == len(known)
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "other"))
    assert shell.json("experience", "import", file)["trials"] == len(known)
    assert shell.json("experience", "import", file)["trials"] == 0
    assert {t["id"] for t in shell.json("experience", "list")} == {t["id"] for t in listed}


def test_adapters_convert(shell: Shell, tmp_path: Path) -> None:
    trial = train(shell)
    done = shell.json("adapters", "convert", trial["adapter"], tmp_path / "out", "--to", "mlx-lm")
    assert done["method"] == "lora" and (tmp_path / "out" / "adapters.safetensors").is_file()


def test_tables_for_people(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    train(shell)
    for words in (["recommend", str(shell.task), *shell.common], ["models", "list"], ["experience", "list"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert "lora" in out and "{" not in out


def test_ctrl_c_leaves_nothing_half_written_and_the_sweep_goes_on_later(shell: Shell, tmp_path: Path) -> None:
    work = tmp_path / "work"
    words = ["sweep", shell.task, *shell.common, "--trials", "40", "--steps", "6", "--work", work, "--seed", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "metapeft.cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in its background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    for line in process.stderr:
        if line.startswith("sweep: trial 2 of 40"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    watchdog.cancel()
    assert process.returncode == 130 and err.splitlines()[-1] == "error: interrupted" and out == ""
    assert not (work / "sweep").exists() and not list(work.glob(".sweep*"))
    words[words.index("40")] = "3"
    found = shell.json(*words)
    assert len(found["trials"]) >= 3 and found["reused"] >= 2
