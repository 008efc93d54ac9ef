"""`dvc repro` in a copy of the repository: all runs once, and a changed parameter runs only what depends on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from metapeft.stages import NAMES
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file, spam_rows

ROOT = Path(__file__).resolve().parents[2]
METRICS = "artifacts/evaluate/metrics.json"
SMALL: dict[str, Any] = {"sweep": {"trials": 2, "steps": 2}, "train": {"steps": 3}}


class Checkout:
    """A fresh copy of the repository's files, committed, with a small task and a tiny backbone in params.yaml."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = self.git("ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
        for name in files:
            if (ROOT / name).is_file() and not name.startswith("tests/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        spam_file(folder / "data")
        self.change(task="data/spam.jsonl", backbone=str(tiny_folder("llama")), **SMALL)
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "--quiet", "-m", "copy")

    def git(self, *words: str, cwd: Path | None = None) -> str:
        return subprocess.run(
            ["git", *words], cwd=cwd or self.folder, check=True, capture_output=True, text=True
        ).stdout

    def dvc(self, *words: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "METAPEFT_HOME": ".metapeft"}
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *words], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def change(self, **values: Any) -> None:
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for key, value in values.items():
            params[key] = params[key] | value if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(params))

    def repro(self, *targets: str) -> set[str]:
        """Names of the stages that ran."""
        out = self.dvc("repro", *targets)
        return {name for name in NAMES if f"Running stage '{name}'" in out}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "copy").mkdir()
    return Checkout(tmp_path / "copy")


def test_a_changed_file_runs_its_stage_again_and_nothing_else_does(checkout: Checkout) -> None:
    assert checkout.repro("version") == {"version"}
    assert checkout.repro("version") == set()
    checkout.change(train={"steps": 9})
    assert checkout.repro("version") == set()
    before = json.loads((checkout.folder / "artifacts/version/task.json").read_text())
    rows = spam_rows(82)
    (checkout.folder / "data/spam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert checkout.repro("version") == {"version"}
    after = json.loads((checkout.folder / "artifacts/version/task.json").read_text())
    assert before["version"] != after["version"] and before["dvc_id"] != after["dvc_id"]
    assert checkout.git("status", "--porcelain", "artifacts", ".metapeft") == "", "outputs are not for Git"


@pytest.mark.slow
def test_the_whole_pipeline(checkout: Checkout) -> None:
    assert checkout.repro() == set(NAMES)
    assert checkout.repro() == set()
    shown = json.loads(checkout.dvc("metrics", "show", "--json"))
    metrics = shown[""]["data"]["artifacts/evaluate/metrics.json"]["data"]
    assert metrics["tuned"]["n"] == metrics["untuned"]["n"] > 0
    assert metrics["tuned"]["value"] - metrics["untuned"]["value"] == pytest.approx(metrics["gain"])
    checkout.dvc("plots", "show")
    page = (checkout.folder / "dvc_plots/index.html").read_text()
    assert all(title in page for title in ("Loss of the final training", "Trials of the sweep", "Test split"))

    checkout.change(train={"configuration": {"warmup": 0.2}})
    assert checkout.repro() == {"train", "evaluate", "register", "report"}
    diff = json.loads(checkout.dvc("params", "diff", "--json"))
    assert diff["params.yaml"]["train.configuration.warmup"]["new"] == 0.2
    checkout.change(train={"steps": 4})  # what a training costs may decide what is tried first
    after = {"train", "evaluate", "register", "report"}
    assert {"recommend"} | after <= checkout.repro() <= {"recommend", "sweep"} | after
    checkout.change(sweep={"trials": 3})
    assert {"sweep"} <= checkout.repro() <= {"sweep"} | after
    checkout.change(train={"steps": 3, "configuration": {}}, sweep={"trials": 2})
    assert checkout.repro() == set(), "what was computed before comes back from the cache"


@pytest.mark.slow
def test_experiments_differences_and_a_remote(checkout: Checkout) -> None:
    """What people do after the first `dvc repro`: try a value, compare, share, take back."""
    git = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    assert checkout.repro() == set(NAMES)
    checkout.git("add", "--all")
    checkout.git(*git, "commit", "--quiet", "-m", "first")
    out = checkout.dvc("exp", "run", "--name", "longer", "-S", "train.steps=5", "-S", "+train.configuration.warmup=0.2")
    assert "Running stage 'train'" in out and "Running stage 'version'" not in out
    assert yaml.safe_load((checkout.folder / "params.yaml").read_text())["train"]["steps"] == 5

    metrics = json.loads(checkout.dvc("metrics", "diff", "HEAD", "--all", "--json"))
    changed = metrics["diff"]["artifacts/evaluate/metrics.json"] if "diff" in metrics else metrics[METRICS]
    assert {"tuned.value", "untuned.value", "gain"} <= set(changed)
    checkout.dvc("plots", "diff", "HEAD")
    assert "Loss of the final training" in (checkout.folder / "dvc_plots/index.html").read_text()
    assert "longer" in checkout.dvc("exp", "show", "--csv")

    checkout.dvc("push")
    shutil.rmtree(checkout.folder / ".dvc/cache")
    shutil.rmtree(checkout.folder / "artifacts")
    checkout.dvc("pull")
    assert checkout.repro() == set(), "all that was computed came back from the remote"
