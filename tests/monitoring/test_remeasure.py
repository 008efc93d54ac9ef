"""Profiles that are not what their tasks measure like are noticed, told and replaced."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

import metapeft
from metapeft.api import decided
from metapeft.meta import decisions
from metapeft.meta.knowledge import knowledge
from metapeft.monitoring import channels, remeasure, state
from metapeft.monitoring.monitor import monitor
from metapeft.profiling import profiles
from metapeft.settings import load_settings
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """Two tasks were asked about, the second one last."""
    path = tmp_path / "params.yaml"
    path.write_text("data: {max_train: 24, max_validation: 8, max_test: 16}\n")
    for name, rows in (("first", 60), ("second", 80)):
        folder = tmp_path / name
        folder.mkdir()
        task = spam_file(folder, rows).rename(folder / f"{name}.jsonl")
        metapeft.recommend(task, backbone=str(tiny_folder("llama")), params=path)
    return path


def kept(home: Path) -> dict[str, Path]:
    return {json.loads(path.read_text())["task"]: path for path in (home / "profiles").glob("*.json")}


def spoil(path: Path) -> None:
    """As a process would have written it whose loss was in another unit."""
    record = json.loads(path.read_text())
    record["features"]["zero_shot_loss"] /= 3
    record["embedding"] = profiles.embed(record["features"])
    path.write_text(json.dumps(record))


def look(params: Path, **more: Any) -> Any:
    return metapeft.monitor(estimate=False, params=params, **more)


def standing(report: Any) -> dict[str, Any]:
    return next(w for w in report.watches if w["watch"] == "remeasured")


def test_tasks_take_turns_and_what_is_right_stays(params: Path, home: Path) -> None:
    before = {name: path.read_bytes() for name, path in kept(home).items()}
    assert standing(look(params, remeasure=0))["known"]
    report = look(params)
    assert report.healthy and not standing(report)["known"] and standing(report)["decisions"] == 1
    assert standing(look(params))["decisions"] == 2, "the other one"
    places = state.read().remeasured
    report = look(params)
    now = state.read().remeasured
    changed = [place for place in places if now[place] != places[place]]
    assert report.healthy and set(now) == set(places) and len(changed) <= 1  # within a second both may look as old
    assert {name: path.read_bytes() for name, path in kept(home).items()} == before


def test_a_wrong_profile_is_told_and_replaced(params: Path, home: Path) -> None:
    paths = kept(home)
    right = {name: path.read_bytes() for name, path in paths.items()}
    for path in paths.values():
        spoil(path)
    wrong = {name: path.read_bytes() for name, path in paths.items()}
    learned = {version: p.features["zero_shot_loss"] for (version, _), p in knowledge().profiles.items()}

    dry = look(params, tell=False)
    assert [alert.key for alert in dry.alerts] == ["remeasured"] and not dry.retrain
    assert {name: path.read_bytes() for name, path in paths.items()} == wrong, "a dry run mends nothing"

    report = look(params)
    (alert,) = report.alerts
    assert alert.key == "remeasured" and report.retrain and standing(report)["value"] == 1
    assert "2 of 2" in alert.text and "zero_shot_loss +" in alert.text and set(alert.kinds) == {"first", "second"}
    assert {name: path.read_bytes() for name, path in paths.items()} == right, "all of them, though one was asked for"
    for (version, _), found in knowledge().profiles.items():
        if version in {json.loads(path.read_text())["task_version"] for path in paths.values()}:
            assert found.features["zero_shot_loss"] > 2 * learned[version], "the next meta-model learns from these"
    over = look(params)
    assert over.healthy and over.over == ("remeasured",)


def test_what_was_recommended_by_it_is_recommended_anew(params: Path, home: Path) -> None:
    """The stages of the task made their outputs of the wrong profile too."""
    task = params.parent / "second" / "second.jsonl"
    right = metapeft.profile(task, backbone=str(tiny_folder("llama")), params=params)
    spoil(kept(home)["second"])
    (stage,) = (home / "work").glob("second-*")
    (stage / "profile" / "profile.json").unlink()
    wrong = metapeft.profile(task, backbone=str(tiny_folder("llama")), params=params)
    assert wrong.features != right.features
    assert look(params).alerts
    again = metapeft.profile(task, backbone=str(tiny_folder("llama")), params=params)
    assert again.features == right.features


def test_the_same_rows_under_another_metric_are_another_profile(tmp_path: Path, home: Path) -> None:
    rows = [{"text": f"message {i}", "label": "ham" if i % 6 else "spam"} for i in range(60)]
    task = tmp_path / "odd.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for metric in ("accuracy", "macro_f1"):
        params = tmp_path / f"{metric}.yaml"
        params.write_text(f"data: {{max_train: 24, max_validation: 8, max_test: 16, metric: {metric}}}\n")
        metapeft.recommend(task, backbone=str(tiny_folder("llama")), params=params)
    paths = list((home / "profiles").glob("*.json"))
    before = {path: path.read_bytes() for path in paths}
    assert len(paths) == 2
    assert look(params).healthy and look(params).healthy
    assert {path: path.read_bytes() for path in paths} == before


@pytest.mark.parametrize("where", ["before it is told", "before it is replaced"])
def test_a_kill_loses_neither_the_alert_nor_the_remedy(
    params: Path, home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = kept(home)["second"]
    right = path.read_bytes()
    spoil(path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "before it is told":
            patch.setattr(state, "tell", killed)
        else:
            patch.setattr(remeasure.Remeasured, "mend", killed)
        with pytest.raises(KeyboardInterrupt):
            look(params)
    report = look(params)
    assert [alert.key for alert in report.alerts] == ["remeasured"]
    assert report.retrain
    assert path.read_bytes() == right and look(params).healthy


def test_a_channel_that_was_away_hears_of_it_later(params: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(kept(home)["second"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv(channels.URL, f"http://127.0.0.1:{port}/")
    assert "webhook" in look(params).undelivered
    report = look(params)
    assert [alert.key for alert in report.alerts] == ["remeasured"], "nothing differs any more"
    monkeypatch.delenv(channels.URL)
    assert look(params).over == ("remeasured",)


def test_tasks_of_airflow_are_at_hand_too(params: Path, home: Path) -> None:
    (home / "airflow" / "tune_task").mkdir(parents=True)
    (stage,) = (home / "work").glob("second-*")
    stage.rename(home / "airflow" / "tune_task" / "manual__1")
    assert [decided(entry) is not None for entry in decisions.read()] == [True, True]


def test_tasks_that_cannot_be_measured_are_left(params: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(kept(home)["second"])
    gone = remeasure.run(5, lambda entry: None, pytest.fail, pytest.fail)
    assert gone == []

    def broken(name: str) -> Any:
        raise metapeft.UserError(f"no backbone {name} here")

    assert remeasure.run(5, decided, broken, pytest.fail) == [] and "no backbone" in capsys.readouterr().err
    assert monitor(load_settings()).healthy and len(decisions.read()) == 2
