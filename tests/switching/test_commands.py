"""The commands, through Python: a training that may switch, and tasks one after another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import yaml

from metapeft import api, stages
from metapeft.errors import UserError
from metapeft.settings import load_settings
from metapeft.stages.files import read_task
from metapeft.switching.decide import differing
from metapeft.tracking import models
from metapeft.tracking.client import uri
from metapeft.tracking.restore import restore
from metapeft.training.configuration import full
from metapeft.training.evaluation import untuned
from metapeft.training.session import Session
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file

START = {"learning_rate": 1e-4, "tokens": 4, "width": 16}


def test_tasks_one_after_another(home: Path, database: Path, tmp_path: Path) -> None:
    shutil.copy(database, home / "mlflow.db")
    files = []
    for name in ("one", "two"):
        files.append(spam_file(tmp_path, 60).rename(tmp_path / f"{name}.jsonl"))
    found = api.train_sequence(files, keep="l2", steps=4, backbone=str(tiny_folder("llama")), configuration={"rank": 2})
    assert [len(row) for row in found.scores] == [1, 2] and all(Path(a).is_dir() for a in found.adapters)
    assert found.models == [] and models.list_models(load_settings()) == [], "one adapter for both is nobody's model"
    params = tmp_path / "params.yaml"  # what it says of `metapeft train` is not what makes these
    of_train = {"method": "prompt", "configuration": {"tokens": 8, "learning_rate": 0.1}, "switch": True}
    params.write_text(yaml.safe_dump({"backbone": str(tiny_folder("llama")), "train": of_train}))
    for _ in range(2):  # the second time it is read, and nothing is registered again
        own = api.train_sequence(files, steps=4, configuration={"rank": 2}, params=params)
        registered = models.list_models(load_settings())
        assert [(m.task, m.version, m.aliases) for m in registered] == [(n, 1, ("champion",)) for n in ("one", "two")]
        assert [m.score for m in registered] == [row[-1] for row in own.scores]
    client = mlflow.MlflowClient(uri(load_settings().tracking))
    [run] = client.search_runs(["1"], "tags.keep = 'l2'")
    assert run.data.metrics["sequence.forgetting"] == found.forgetting
    back = restore(load_settings(), "two", tmp_path / "back")
    train = yaml.safe_load((tmp_path / "back" / "params.yaml").read_text())["train"]
    assert train["configuration"] == full({"method": "lora", "rank": 2}) == registered[1].configuration
    assert (train["method"], train["steps"], train["switch"]) == ("lora", 4, False)
    assert back.task_version == registered[1].task_version
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="two tasks of the sequence are called one"):
        api.train_sequence([files[0], spam_file(tmp_path / "other", 50).rename(tmp_path / "other" / "one.jsonl")])
    with pytest.raises(UserError, match="at least one task"):
        api.train_sequence([])
    with pytest.raises(UserError, match="twice"):
        api.train_sequence([files[0], files[1], str(files[0])])


@pytest.mark.slow
def test_a_training_that_may_switch(tmp_path: Path) -> None:
    """The whole pipeline: the record lies beside the trial and replays, the trial is none of the experience's."""
    file, backbone = spam_file(tmp_path), str(tiny_folder("llama"))
    options = {"method": "p_tuning", "configuration": START, "steps": 40, "switch": True}
    trial = api.train(file, backbone=backbone, **options)
    assert trial.method == "switching" and trial.score is not None
    settings = api.settings_for(file, backbone=backbone, train=options)
    work = api.work_folder(settings)
    record = json.loads((work / "train" / "switching.json").read_text(encoding="utf-8"))
    assert record["trial"] == trial.id and record["decisions"] and differing(record["decisions"]) == []
    from metapeft.backbones import load
    from metapeft.meta.experience import Experience

    session = Session(load(backbone), read_task(work / "version"))
    known = {decision["evidence"]["untuned"] for decision in record["decisions"]}
    assert known == {untuned(session, "validation").value}, "test answers choose no method"

    assert trial.id not in {t.id for t in Experience().trials()}
    static = api.train(file, backbone=backbone, **(options | {"switch": False}))
    assert static.id != trial.id and static.method == "p_tuning"
    page = api.report_of(file, backbone=backbone).read_text(encoding="utf-8")
    assert "What it answers" in page and "How it learned" in page and "How the method was chosen" not in page
    assert stages.get("train").current(settings, work) is False  # the same folder holds the static one now
