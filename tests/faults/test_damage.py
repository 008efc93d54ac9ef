"""Every kind of file that the product reads, truncated, overwritten, emptied, gone, or a folder instead.

Either what the file held is made again and nobody notices, or one sentence says which file it is and what to do; once
it is mended (put back, or removed) all is as before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from metapeft.errors import MetapeftError
from metapeft.meta.experience import Experience
from metapeft.training.trial import Trial
from tests.faults import damages
from tests.faults.pipeline import STAGES, Pipeline
from tests.faults.sound import sound

pytestmark = pytest.mark.timeout(3000)


@dataclass(frozen=True)
class Read:
    """A file that a stage reads: where it is, which stage, and whether its content can be made again."""

    files: str  # a pattern below the pipeline's folder
    stage: str
    again: bool


READ = {
    "speed": Read("home/speed/*.json", "profile", True),
    "profile cache": Read("home/profiles/*.json", "profile", True),
    "untuned score": Read("home/untuned/*.json", "evaluate", True),
    "experience segment": Read("home/experience/segments/*.jsonl", "recommend", True),
    "decisions": Read("home/decisions.jsonl", "recommend", True),
    "adapter manifest": Read("home/adapters/*/manifest.json", "train", True),
    "adapter weights": Read("home/adapters/*/adapter_model.safetensors", "train", True),
    "adapter record": Read("home/adapters/*/metapeft.json", "train", True),
    "adapter configuration": Read("home/adapters/*/adapter_config.json", "train", True),
    "Optuna database": Read("home/sweeps/*.db", "sweep", False),
    "MLflow database": Read("home/mlflow.db", "register", False),
    "stage record": Read("work/.stages/version.json", "version", True),
    "MLflow run record": Read("work/.stages/mlflow.json", "register", True),
    "stage output task.json": Read("work/version/task.json", "validate", False),
    "stage output data.jsonl": Read("work/version/data.jsonl", "validate", False),
    "stage output profile.json": Read("work/profile/profile.json", "recommend", False),
    "stage output configurations.json": Read("work/recommend/configurations.json", "sweep", False),
    "stage output nearest.json": Read("work/recommend/nearest.json", "sweep", False),
    "stage output recommendation.json": Read("work/recommend/recommendation.json", "register", False),
    "stage output sweep.json": Read("work/sweep/sweep.json", "train", False),
    "stage output trials.jsonl": Read("work/sweep/trials.jsonl", "train", False),
    "stage output trial.json": Read("work/train/trial.json", "evaluate", False),
    "stage output adapter": Read("work/train/adapter/adapter_model.safetensors", "evaluate", False),
    "stage output model.json": Read("work/register/model.json", "report", False),
    "stage output report.json": Read("work/validate/report.json", "report", False),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", READ)
def test_a_stage_reads_a_damaged_file(pipeline: Pipeline, kind: str, figure: Any) -> None:
    read = READ[kind]
    refused = 0
    for how in damages.NAMES:
        pipeline.restore("end")
        (path, *_) = sorted(pipeline.now.glob(read.files))
        data = path.read_bytes()
        record = pipeline.work / ".stages" / f"{read.stage}.json"
        if record != path:
            record.unlink(missing_ok=True)  # so that the stage runs again
        damages.damage(path, how)
        ended = pipeline.run(read.stage)
        where = f"{kind}, {how}: {ended.err}"
        if ended.code:
            refused += 1
            assert ended.code in (1, 2) and "--debug" not in ended.error, where
            assert not read.again or how == "a folder", where
            if not path.exists() or path.is_dir() or path.read_bytes() != data:
                damages.restore(path, data)
            for beside in path.parent.glob(f"{path.name}-*"):  # SQLite's log is of another life
                beside.unlink()
            ended = pipeline.run(read.stage)
            assert ended.code == 0, f"put back after {where}\n{ended.err}"
        assert pipeline.outcome(read.stage).keys() == pipeline.outcomes[read.stage].keys(), where
    figure(f"{kind}: {len(damages.NAMES)} damages, {refused} refused in one sentence, the others mended")


@pytest.mark.faults
def test_a_damaged_stage_output_is_made_again(pipeline: Pipeline, figure: Any) -> None:
    """A folder of results that was changed is no longer what its record says: the whole pipeline mends itself."""
    for stage in STAGES[:4]:
        pipeline.restore("end")
        path = next(p for p in sorted((pipeline.work / stage).iterdir()) if p.suffix == ".json")
        damages.damage(path, "half")
        for name in STAGES:
            ended = pipeline.run(name)
            assert ended.code == 0, ended.err
            assert pipeline.outcome(name) == pipeline.outcomes[name], f"{name} after {path.name}"


# What no stage reads.


def trial(number: int) -> Trial:
    return Trial(
        id=f"t{number}",
        task="task",
        task_version="v",
        backbone="b",
        method="lora",
        configuration={"method": "lora", "learning_rate": 1e-3},
        seed=0,
        budget=3,
        status="ok",
        started=f"2026-01-01T00:00:0{number}+00:00",
    )


def each_damage(path: Path, read: Callable[[], Any], name: str) -> list[Any]:
    """What `read` made of every damage; the file is put back between them, and then must be read again."""
    data = path.read_bytes()
    before = read()
    found = []
    for how in damages.NAMES:
        damages.damage(path, how)
        found.append(sound(f"{name}, {how}", read, MetapeftError))
        damages.restore(path, data)
        os.utime(path)
        assert read() == before, how
    return found


def test_experience_table(home: Path) -> None:
    store = Experience(shipped=None)
    store.extend([trial(n) for n in range(3)])
    table = store.compact()
    each_damage(table, lambda: [t.id for t in Experience(shipped=None).trials()], "experience.parquet")
    copy = home / "copy.parquet"
    copy.write_bytes(table.read_bytes())
    each_damage(copy, lambda: Experience(home / "other", shipped=None).merge(copy) >= 0, "imported parquet")
    store.export(lines := home / "copy.jsonl")
    each_damage(lines, lambda: Experience(home / "third", shipped=None).merge(lines) >= 0, "imported jsonl")


def test_experience_segment_keeps_the_lines_that_are_whole(home: Path) -> None:
    store = Experience(shipped=None)
    store.extend([trial(n) for n in range(3)])
    store.close()
    (segment,) = (home / "experience" / "segments").glob("*.jsonl")
    data = segment.read_bytes()
    segment.write_bytes(data[:-10])
    assert [t.id for t in Experience(shipped=None).trials()] == ["t0", "t1"]
    lines = data.splitlines(keepends=True)
    for wrong in (b"[" * 100_000, b"null", b'{"id": 1}', b'{"id": "x", "started": 3, "configuration": null}', b"\xff"):
        segment.write_bytes(lines[0] + wrong + b"\n" + lines[2])
        assert [t.id for t in Experience(shipped=None).trials()] == ["t0", "t2"], wrong[:40]


def test_meta_model_versions(home: Path) -> None:
    from metapeft.meta import versions
    from metapeft.meta.model import Model

    for _ in range(2):
        versions.promote(versions._add(versions.Version(0, Model())).number)
    champion, second = home / "meta" / "champion.json", home / "meta" / "versions" / "0002.json"

    def read() -> Any:
        return versions.champion().number, [v.number for v in versions.versions()]

    found = each_damage(second, read, "meta-model version")
    assert all(now[0] in (1, 2) for now in found), "a version that cannot be read gives way to the one before"
    each_damage(champion, read, "champion.json")

    def back_and_forth() -> Any:
        versions.promote(1)
        versions.promote(2)
        return versions.champion().number

    damaged = champion.read_bytes()
    for how in damages.NAMES:
        damages.damage(champion, how)
        sound(f"champion.json, {how}", versions.rollback, MetapeftError)
        damages.restore(champion, damaged) if champion.is_dir() else None
        assert back_and_forth() == 2


def test_keys(home: Path) -> None:
    """Damaged keys are refused, never read as no keys: a server must not fall open."""
    from metapeft.serving import keys

    keys.create("one")
    ring = keys.Keyring()
    path = keys.path()
    data = path.read_bytes()
    for how in damages.NAMES:
        damages.damage(path, how)
        found = sound(f"keys, {how}", keys.load, MetapeftError)
        assert found is None or how in ("missing", "a flipped bit"), how
        sound(f"key ring, {how}", lambda: ring.any, MetapeftError)
        sound(f"key created, {how}", lambda: keys.create("two") and None, MetapeftError)
        damages.restore(path, data)
        os.utime(path)
        assert [key.name for key in keys.load()] == ["one"] and ring.any


def test_decisions_and_deployments(home: Path) -> None:
    from metapeft.meta import decisions
    from metapeft.serving import registry

    path = home / "decisions.jsonl"
    entry = {"id": "a", "at": "2026-01-01T00:00:00.000000+00:00", "task": "t", "task_version": "v", "backbone": "b"}
    path.write_text(json.dumps(entry | {"model": 0, "recommendations": []}) + "\n")
    each_damage(path, lambda: [o.recommendation for o in decisions.outcomes([])], "decisions.jsonl")
    path = registry.history()
    done = registry.Deployment("2026", "m", "t", "champion", 1, None, "deployed", "", 0.1)
    registry._remember(done)
    each_damage(path, registry._remembered, "deployments.jsonl")


def test_selections_of_the_server(home: Path) -> None:
    from metapeft.serving import select

    selector = select.Selector("b")
    selector._remember(select.Job("a" * 24, "done", {"task": "x"}, 1.0, {"recommendations": []}))
    path = select.folder() / f"{'a' * 24}.json"

    def read() -> Any:
        fresh = select.Selector("b")
        return fresh.get("a" * 24), fresh.recent()

    each_damage(path, read, "selection")


def test_profiles_of_other_versions_are_passed_over(home: Path) -> None:
    from metapeft.profiling import profiles

    shipped = sorted(profiles.SHIPPED.glob("*.json"))
    if not shipped:
        pytest.skip("no profiles are shipped")
    (home / "profiles").mkdir()
    path = home / "profiles" / f"x-{profiles.VERSION}.json"
    path.write_bytes(shipped[0].read_bytes())
    each_damage(path, lambda: len(profiles.every_profile()), "profile")


def test_backbone_folder(tmp_path: Path) -> None:
    from metapeft import backbones
    from tests.backbones.tiny import tiny_folder

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    for name in sorted(path.name for path in folder.iterdir()):
        each_damage(folder / name, lambda: backbones.load(str(folder), dequantize=False).context_length, name)


def test_resume_state(tmp_path: Path) -> None:
    """A state that cannot be used is no state: the training starts afresh and ends the same."""
    from metapeft.backbones import load
    from metapeft.training import trainer
    from metapeft.training.session import Session
    from tests.backbones.tiny import tiny_folder
    from tests.training import made

    class Stop(Exception):
        pass

    session = Session(load(str(tiny_folder("llama")), dequantize=False), made.classification())
    configuration = {"method": "lora", **made.SMALL.get("lora", {})}
    folder = tmp_path / "adapter"
    whole = trainer.run_trial(session, configuration, steps=4, folder=tmp_path / "whole").curve[-1]["train_loss"]

    def stop(event: dict[str, Any]) -> bool:
        if event["step"] == 3:
            raise Stop
        return False

    before, trainer.STATE_SECONDS = trainer.STATE_SECONDS, 0.0
    try:
        with pytest.raises(Stop):
            trainer.run_trial(session, configuration, steps=4, folder=folder, progress=stop)
    finally:
        trainer.STATE_SECONDS = before
    state = folder / "state.safetensors"
    data = state.read_bytes()
    for how in damages.BYTES:
        folder.mkdir(exist_ok=True)
        state.write_bytes(data)
        damages.damage(state, how)
        trial = trainer.run_trial(session, configuration, steps=4, folder=folder)
        assert trial.status == "ok" and trial.curve[-1]["train_loss"] == pytest.approx(whole, rel=1e-4), how
        shutil.rmtree(folder)
