"""kill -9 at points of commands that are no pipeline: what they promised is kept, and the same command ends them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.backbones.tiny import tiny_folder
from tests.faults.zygote import Zygote
from tests.stages.made import spam_file

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
EVERY = int(os.environ.get("METAPEFT_FAULT_EVERY", "1"))  # of the points, every how-manieth


@pytest.mark.parametrize("name", ["adapt", "train-sequence"])
def test_a_kill_at_any_point_loses_nothing(zygote: Zygote, name: str, tmp_path: Path, figure: Any) -> None:
    one = spam_file(tmp_path, 40).rename(tmp_path / "one.jsonl")
    two = spam_file(tmp_path, 40).rename(tmp_path / "two.jsonl")
    small = ["--backbone", str(tiny_folder("llama"))]
    words = {
        "adapt": ["adapt", str(one), "--shots", "4", "--strategy", "cold lora", "--strategy", "context", *small],
        "train-sequence": ["train-sequence", str(one), str(two), "--steps", "2", *small],
    }[name]
    fresh, home = tmp_path / "fresh", tmp_path / "home"
    fresh.mkdir()

    def call(function: str, **options: Any) -> Any:
        places = {"METAPEFT_HOME": str(home), "METAPEFT_SLOTS": str(tmp_path / "slots")}
        return zygote.call(f"tests.faults.pipeline:{function}", environment=places, **options)

    home.mkdir()
    assert call("make_database").code == 0
    shutil.copytree(home, fresh, dirs_exist_ok=True)
    whole = call("command_again", words=words)
    assert whole.code == 0 and whole.result["code"] == 0, whole.err
    promised = sorted(line for line in whole.result["after"] if line.startswith("model "))
    assert len(promised) == {"adapt": 1, "train-sequence": 2}[name]
    tried, kept, at = 0, 0, 1
    while True:
        shutil.rmtree(home)
        shutil.copytree(fresh, home)
        acks = tmp_path / f"acks-{at}"
        fault = {"roots": [str(home)], "kind": "kill", "at": at}
        ended = call("command", words=words, acks=str(acks), fault=fault)
        if ended.code == 0:
            break
        where = f"point {at}: {ended.points[-1]}"
        assert ended.code == -signal.SIGKILL, f"{where}\n{ended.err}"
        given = set(acks.read_text().splitlines()) if acks.exists() else set()
        again = call("command_again", words=words)
        assert again.code == 0 and again.result["code"] == 0, f"{where}\n{again.err}"
        assert given <= set(again.result["before"]) <= set(again.result["after"]), where
        assert sorted(line for line in again.result["after"] if line.startswith("model ")) == promised, where
        tried, kept, at = tried + 1, kept + len(given), at + EVERY
    assert tried, "no point was reached"
    figure(f"{name}: killed at {tried} points, {kept} promises kept")
