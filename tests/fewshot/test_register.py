"""What came of a few shots is recorded and registered, served by a real server, and restored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest

import metapeft
from metapeft import cli, tracking
from metapeft.fewshot.choose import Prior
from metapeft.settings import load_settings
from metapeft.tracking import exchange, models
from metapeft.tracking.client import uri
from metapeft.tracking.restore import restore
from tests.backbones.tiny import tiny_folder
from tests.serving.made import serving
from tests.stages.made import spam_file, spam_rows

LIKED = {"context": Prior(0.9, 0.01), "cold lora": Prior(0.9, 0.01)}


@pytest.fixture(autouse=True)
def liked(home: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random backbone learns little: without a prior it is best left untuned."""
    shutil.copy(database, home / "mlflow.db")
    monkeypatch.setattr("metapeft.fewshot.adapt.measured", lambda kind: LIKED)


def file_of(folder: Path, count: int) -> Path:
    path = folder / "mail.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in spam_rows(count)), encoding="utf-8")
    return path


def test_a_file_of_shots_is_registered_served_and_restored(home: Path, tmp_path: Path) -> None:
    model = str(home / "tiny")
    shutil.copytree(tiny_folder("llama"), model)
    path = file_of(tmp_path, 6)
    found = metapeft.adapt(path, backbone=model, strategies=["context"])
    assert found.trial and found.trial.validation and found.trial.validation.n == 6 and found.score is None
    settings = load_settings(backbone=model)
    [version] = models.list_models(settings)
    assert found.registered["model"] == version.name and found.registered["alias"] == "champion"
    assert (version.metric, version.score) == ("accuracy of held-out shots", found.trial.validation.value)
    assert version.trial == found.trial.id and version.dvc_id and version.task == "mail"
    run = mlflow.MlflowClient(uri(settings.tracking)).get_run(found.registered["run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["strategy"] == "context" and run.data.tags["shots"] == "6"
    assert run.data.metrics["peak_memory_mb"] > 0
    assert run.data.metrics["adapt.gain"] == pytest.approx(found.chosen.gain if found.chosen else 0)
    assert exchange.collect(settings) == [], "no experience: the configuration alone does not make it again"

    again = metapeft.adapt(path, backbone=model, strategies=["context"])
    assert (again.registered["version"], len(models.list_models(settings))) == (1, 1)

    with serving(home, model) as server, server.client() as client:
        asked = client.post("/v1/classify", json={"model": "task/mail", "input": "free prize"})
        assert asked.status_code == 200 and asked.json()["data"][0]["probabilities"].keys() == {"ham", "spam"}

    back = restore(settings, "mail", tmp_path / "back")
    [told] = [warning for warning in back.warnings if "adapt" in warning]
    assert f"metapeft adapt {back.task} --shots 6 --strategy 'context'" in told and "library" not in told
    assert back.task_version == version.task_version and (tmp_path / "back" / "model").is_dir()


def test_beside_a_model_of_the_whole_task(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("data: {max_train: 12, max_validation: 4, max_test: 6}\n")
    words = [str(spam_file(tmp_path)), "--backbone", str(tiny_folder("llama")), "--params", str(params), "--json"]
    assert cli.main(["adapt", *words, "--shots", "4", "--strategy", "cold lora"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["registered"]["version"], first["registered"]["alias"]) == (1, "champion")
    [version] = models.list_models(load_settings(params, backbone=str(tiny_folder("llama"))))
    assert (version.metric, version.score) == ("accuracy", first["score"]["value"])
    assert version.untuned_score == first["untuned_score"]["value"]
    assert cli.main(["adapt", *words, "--shots", "1", "--strategy", "context"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["trial"]["validation"] is None and one["registered"]["version"] == 2
    assert cli.main(["compare", "--params", str(params), "--json"]) == 0
    assert {row["trial"] for row in json.loads(capsys.readouterr().out)} == {first["trial"]["id"], one["trial"]["id"]}


def test_more_shots_and_a_test_split_go_before(home: Path, tmp_path: Path) -> None:
    """A score of held-out shots is no reason to keep a version that learned from fewer."""
    model = str(tiny_folder("llama"))
    names = [metapeft.adapt(file_of(tmp_path, n), backbone=model, strategies=["context"]) for n in (6, 10, 8)]
    assert [f.registered["alias"] for f in names] == ["champion", "champion", "challenger"]
    assert "learned from 10 shots, champion version 1 from 6" in names[1].registered["reason"]
    task = file_of(tmp_path, 60)
    tested = metapeft.adapt(task, backbone=model, strategies=["context"], shots=2)
    assert tested.score and tested.registered["alias"] == "champion" and tested.registered["version"] == 4
    again = metapeft.adapt(file_of(tmp_path, 12), backbone=model, strategies=["context"])
    assert again.registered["alias"] == "challenger" and "not comparable" in again.registered["reason"]


def test_a_run_that_others_began_is_not_written_over(home: Path, tmp_path: Path) -> None:
    model = str(tiny_folder("llama"))
    settings = load_settings(backbone=model)
    with tracking.run(settings, "of somebody") as tracker, pytest.MonkeyPatch.context() as patch:
        patch.setenv(tracking.RUN_ID, tracker.run_id)
        for count in (4, 6):
            metapeft.adapt(file_of(tmp_path, count), backbone=model, strategies=["context"])
            path = tmp_path / f"of-{count}"
            path.mkdir()
            shutil.copy(tmp_path / "mail.jsonl", path / "mail.jsonl")
    for version, count in ((1, 4), (2, 6)):
        shutil.copy(tmp_path / f"of-{count}" / "mail.jsonl", tmp_path / "mail.jsonl")
        back = restore(settings, f"mail@{version}", tmp_path / f"back-{version}")
        assert any(f"--shots {count}" in warning for warning in back.warnings)


def test_what_nothing_has_measured_is_not_registered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "1 ->", "completion": "2"}) + "\n")
    words = ["adapt", str(path), "--backbone", str(tiny_folder("llama"))]
    assert cli.main(words) == 0
    assert "not registered: nothing has measured it" in capsys.readouterr().out
    assert models.list_models(load_settings()) == []
    monkeypatch.setattr("metapeft.fewshot.adapt.measured", lambda kind: {"context": Prior(-0.9, 0.01)})
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "no adapter is needed" in said and "registered" not in said
    assert cli.main(["adapt", str(path), "--params", str(tmp_path / "none.yaml")]) == 2
