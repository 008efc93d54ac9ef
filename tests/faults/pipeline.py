"""A tiny pipeline, with a copy of all its files before each stage, to harm one stage at a time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.backbones.tiny import tiny_folder
from tests.faults.zygote import Ended, Zygote
from tests.stages.made import spam_file

STAGES = ("version", "validate", "profile", "recommend", "sweep", "train", "evaluate", "register", "report")
CHANGING = {"started", "seconds", "train_seconds", "cpu_seconds", "peak_memory_mb", "curve", "run_id", "cost", "loss"}
CHANGING |= {"reason", "run_url"}  # "registered before as version 1"


class Pipeline:
    """Folders of one pipeline: `now` holds home and work as they are, `before/STAGE` as they were before a stage."""

    def __init__(self, base: Path, zygote: Zygote):
        self.base, self.zygote = base, zygote
        self.now = base / "now"
        self.home, self.work = self.now / "home", self.now / "work"
        self.task = spam_file(base)
        self.home.mkdir(parents=True)
        sizes = ("sweep.trials=2", "sweep.steps=2", "train.steps=3")
        values = (f'task="{self.task}"', f'backbone="{tiny_folder("llama")}"', *sizes)
        self.words = ["--work", str(self.work), *(word for value in values for word in ("--set", value))]
        self.outcomes: dict[str, Any] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {"METAPEFT_HOME": str(self.home), "METAPEFT_SLOTS": str(self.base / "slots")}

    def prepare(self) -> None:
        """Runs the whole of it once."""
        self.call("tests.faults.pipeline:make_database")
        for stage in STAGES:
            shutil.copytree(self.now, self.base / "before" / stage)
            ended = self.run(stage)
            assert ended.code == 0, ended.err
            self.outcomes[stage] = self.outcome(stage)
        shutil.copytree(self.now, self.base / "before" / "end")

    def restore(self, stage: str) -> None:
        """Everything as it was before a stage ("end": after the last)."""
        empty(self.now)
        shutil.copytree(self.base / "before" / stage, self.now, dirs_exist_ok=True)

    def call(self, function: str, **options: Any) -> Ended:
        return self.zygote.call(function, environment=self.environment, **options)

    def run(self, stage: str, kind: str | None = None, at: int = 0, acks: Path | None = None) -> Ended:
        """A stage as a process; kind, at: the fault to arm (see `points`)."""
        fault = {"roots": [str(self.home), str(self.work)], "kind": kind, "at": at} if kind else None
        given = str(acks) if acks else None
        return self.call("tests.faults.pipeline:stage", name=stage, words=self.words, acks=given, fault=fault)

    def recover(self, stage: str) -> Ended:
        """The stage again; `result` says what was known before it and after it."""
        return self.call("tests.faults.pipeline:recovered", name=stage, words=self.words)

    def outcome(self, stage: str) -> dict[str, Any]:
        """What a stage left, without what no two runs share."""
        found: dict[str, Any] = {}
        for path in sorted((self.work / stage).rglob("*")):
            name = path.relative_to(self.work).as_posix()
            if path.suffix in (".json", ".jsonl") and path.parent.name != "adapter" and path.name != "sweep.json":
                text = path.read_text()
                values = (
                    [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
                )
                found[name] = settled(values)
                if stage == "sweep" and path.suffix == ".jsonl":
                    for trial in found[name]:  # which trials are tested too depends on which was the fastest
                        trial.pop("score", None)
            elif path.is_file():
                found[name] = path.suffix
        return found


def settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: settled(inner) for key, inner in value.items() if key not in CHANGING}
    if isinstance(value, list):
        inner = [settled(item) for item in value]
        return (
            sorted(inner, key=lambda v: v["id"]) if inner and isinstance(inner[0], dict) and "id" in inner[0] else inner
        )
    return value


def empty(folder: Path) -> None:
    """Removes what is in a folder, which itself may be a mount point."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# What runs in the children.


def make_database() -> None:
    from metapeft.settings import TrackingSettings
    from metapeft.tracking.client import connect

    connect(TrackingSettings())


def stage(name: str, words: list[str], acks: str | None) -> int:
    """A stage's main. acks: a file that gets a line for everything that was promised to be kept."""
    from metapeft import stages

    if acks:
        _acknowledge(acks)
    return stages.get(name).main(words)


def _acknowledge(acks: str) -> None:
    from metapeft.meta import decisions
    from metapeft.meta.experience import Experience
    from metapeft.tracking.tracker import Tracker

    file = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    write, record, register = Experience._write, decisions.record, Tracker.register

    def written(self: Any, records: list[dict[str, Any]]) -> None:
        write(self, records)
        for one in records:
            os.write(file, f"trial {one['id']} {one['score'] is not None}\n".encode())

    def recorded(*arguments: Any) -> str:
        id = record(*arguments)
        os.write(file, f"decision {id}\n".encode())
        return id

    def registered(self: Any, *arguments: Any) -> Any:
        found = register(self, *arguments)
        os.write(file, f"model {found.model.name} {found.model.version} {found.model.trial}\n".encode())
        return found

    Experience._write, decisions.record, Tracker.register = written, recorded, registered  # type: ignore


def known() -> list[str]:
    """What a process that starts now finds of what was promised, as `acks` lists it; files must all be whole."""
    import sqlite3

    from metapeft.meta import decisions
    from metapeft.meta.experience import Experience
    from metapeft.peft import checkpoints
    from metapeft.settings import home, load_settings
    from metapeft.tracking.models import list_models

    found = [f"trial {t.id} {t.score is not None}" for t in Experience().trials()]
    found += [f"trial {t.id} False" for t in Experience().trials() if t.score is not None]
    found += [f"decision {entry['id']}" for entry in decisions.read()]
    found += [f"model {m.name} {m.version} {m.trial}" for m in list_models(load_settings())]
    for folder in (home() / "adapters").glob("*"):
        if not folder.name.startswith(".") and (folder / "manifest.json").exists():  # .ID.new-…: being built
            checkpoints.read(folder)
    for database in (home() / "mlflow.db", *(home() / "sweeps").glob("*.db")):
        with sqlite3.connect(database) as connection:
            assert connection.execute("pragma integrity_check").fetchone() == ("ok",), database
    return found


def recovered(name: str, words: list[str]) -> dict[str, Any]:
    from metapeft import stages

    before = known()
    code = stages.get(name).main(words)
    return {"before": before, "code": code, "after": known()}


def command(words: list[str], acks: str | None = None) -> int:
    """A command, with what is promised noted as for a stage."""
    from metapeft import cli

    if acks:
        _acknowledge(acks)
    return cli.main(words)


def command_again(words: list[str]) -> dict[str, Any]:
    before = known()
    code = command(words)
    return {"before": before, "code": code, "after": known()}
