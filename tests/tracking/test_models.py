"""The registry: what may become champion, going back, finding an adapter again."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metapeft import tracking
from metapeft.data.task import Task
from metapeft.errors import MetapeftError, UserError
from metapeft.settings import Settings, home
from metapeft.tracking import models
from metapeft.tracking.client import connect
from metapeft.tracking.models import (
    Registration,
    list_models,
    promote,
    registered_name,
    resolve,
    rollback,
    weights_digest,
)
from metapeft.training.trial import Score, Trial
from tests.tracking.made import make_adapter, make_trial
from tests.tracking.test_tracker import RECOMMENDATION, replace_uri

NAME = "task-sms_spam--smollm2-135m-instruct"


def register(settings: Settings, task: Task, trial: Trial, alias: str = "champion") -> Registration:
    folder = make_adapter(Path("adapters") / trial.id, content=trial.id)
    with tracking.run(settings, "train") as tracker:
        return tracker.register(folder, trial, task, RECOMMENDATION, alias)


def test_a_version_carries_its_metadata_and_its_files(settings: Settings, task: Task) -> None:
    trial = make_trial(1, 0.91)
    done = register(settings, task, trial)
    assert (done.alias, done.reason) == ("champion", "no champion before")
    folder, model = resolve(settings, "task/sms_spam")
    assert model == done.model
    assert (model.name, model.version, model.aliases) == (NAME, 1, ("champion",))
    assert (model.method, model.configuration, model.backbone) == ("lora", trial.configuration, trial.backbone)
    assert (model.score, model.standard_error, model.untuned_score) == (0.91, 0.02, 0.5)
    assert (model.task, model.task_version, model.dvc_id, model.trial) == ("sms_spam", task.version, "d" * 32, trial.id)
    assert model.expected is not None and model.expected["p_best"] == 0.3
    assert (folder / "adapter_model.safetensors").read_text() == trial.id
    assert {p.suffix for p in (home() / "mlartifacts").rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_only_a_version_that_is_not_worse_becomes_champion(settings: Settings, task: Task) -> None:
    register(settings, task, make_trial(1, 0.90))
    worse = register(settings, task, make_trial(2, 0.85))
    assert worse.alias == "challenger" and worse.model.aliases == ("challenger",)
    assert "0.850" in worse.reason and "version 1 0.900" in worse.reason
    equal = register(settings, task, make_trial(3, 0.90))
    assert equal.alias == "champion"
    other = make_trial(4, 0.99, score=Score("macro_f1", 0.99, 0.01, 300, 0.1))
    assert register(settings, task, other).alias == "challenger"
    newer = register(settings, replace(task, version="f" * 16), make_trial(5, 0.95))
    assert newer.alias == "champion" and "another version of the data" in newer.reason
    assert {m.version: m.aliases for m in list_models(settings)} == {
        1: (),
        2: (),
        3: (),
        4: ("challenger",),
        5: ("champion",),
    }


def test_another_task_of_the_same_name_is_no_rival(settings: Settings, task: Task) -> None:
    """Two files called alike: the second's better score says nothing of the first."""
    assert register(settings, task, make_trial(1, 0.6)).alias == "champion"
    other = replace(task, version="f" * 16, labels=("false", "true"))
    found = register(settings, other, make_trial(2, 0.9))
    assert found.alias == "challenger" and "labels or template" in found.reason
    assert register(settings, replace(task, version="e" * 16), make_trial(3, 0.7)).alias == "champion"


def test_the_same_adapter_is_registered_once(settings: Settings, task: Task) -> None:
    first = register(settings, task, make_trial(1, 0.9))
    again = register(settings, task, make_trial(1, 0.9))
    assert again.model == first.model and (again.alias, again.reason) == ("champion", "registered before as version 1")
    with tracking.run(settings, "retrained") as tracker:
        other = tracker.register(make_adapter(Path("adapters/other"), "other weights"), make_trial(1, 0.9), task)
    assert other.model.version == 2 and other.alias == "champion"
    assert register(settings, task, make_trial(1, 0.9)).alias == ""
    assert len(list_models(settings)) == 2


def test_an_interrupted_registration_is_finished_by_the_next(settings: Settings, task: Task) -> None:
    register(settings, task, make_trial(1, 0.8))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("metapeft.tracking.models._crown", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        register(settings, task, make_trial(2, 0.9))
    assert [m.aliases for m in list_models(settings)] == [(), ("champion",)]
    assert register(settings, task, make_trial(2, 0.9)).model.aliases == ("champion",)
    assert len(list_models(settings)) == 2


def test_what_is_clearly_worse_than_no_adapter_is_not_served(settings: Settings, task: Task) -> None:
    first = register(settings, task, make_trial(1, 0.4))  # ± 0.02, the untuned backbone 0.5
    assert (first.alias, first.reason[-21:]) == ("challenger", "worse than no adapter")
    with pytest.raises(UserError, match="champion"):
        resolve(settings, NAME)
    second = register(settings, task, make_trial(2, 0.49))
    assert (second.alias, "below the untuned backbone" in second.reason) == ("champion", True)
    assert register(settings, task, make_trial(3, 0.45)).alias == "challenger"  # as ever: the champion is better


def test_promote_and_roll_back(settings: Settings, task: Task) -> None:
    for number, score in ((1, 0.7), (2, 0.8), (3, 0.75), (4, 0.9)):
        register(settings, task, make_trial(number, score))
    assert resolve(settings, NAME)[1].version == 4
    assert promote(settings, "sms_spam", 3).aliases == ("champion",)  # the challenger's alias is gone with it
    assert [rollback(settings, "sms_spam").version for _ in range(3)] == [4, 2, 1]
    with pytest.raises(UserError, match="no earlier champion"):
        rollback(settings, "sms_spam")
    promote(settings, NAME, 4)
    assert rollback(settings, NAME).version == 1


def test_rolling_back_survives_deaths_and_deletions(settings: Settings, task: Task) -> None:
    for number, score in ((1, 0.7), (2, 0.8), (3, 0.9)):
        register(settings, task, make_trial(number, score))
    client = connect(settings.tracking)
    client.set_registered_model_alias(NAME, "champion", "2")  # a rollback that died before writing the history
    assert rollback(settings, NAME).version == 1
    client.set_registered_model_alias(NAME, "champion", "3")  # a promotion that died likewise
    assert rollback(settings, NAME).version == 1
    promote(settings, NAME, 2)
    promote(settings, NAME, 3)
    client.delete_model_version(NAME, "2")
    assert rollback(settings, NAME).version == 1


def test_a_promotion_that_dies_halfway_forgets_no_champion(
    settings: Settings, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    for number, score in ((1, 0.7), (2, 0.8), (3, 0.9)):
        register(settings, task, make_trial(number, score))
    writes = []

    def killed(real: Any) -> Any:
        def write(*arguments: Any) -> Any:
            writes.append(real)
            if len(writes) == 2:
                raise KeyboardInterrupt
            return real(*arguments)

        return write

    with monkeypatch.context() as patch:
        for name in ("set_registered_model_alias", "set_registered_model_tag"):
            patch.setattr(MlflowClient, name, killed(getattr(MlflowClient, name)))
        with pytest.raises(KeyboardInterrupt):
            promote(settings, NAME, 1)  # which was champion before
    assert [rollback(settings, NAME).version for _ in range(2)] == [2, 1]


def test_a_folder_that_is_replaced_meanwhile_is_taken_whole(
    settings: Settings, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, copy, swapped = make_trial(1, 0.9), shutil.copytree, []

    def replaced(source: Path, to: Path) -> None:
        """Half is copied when another process puts its own folder there."""
        if not swapped:
            to.mkdir()
            shutil.copy(source / "adapter_model.safetensors", to)
            swapped.append(source.rename(source.with_name("gone")))
            make_adapter(source, content="of another")
            raise FileNotFoundError(str(source / "adapter_config.json"))
        copy(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(models.shutil, "copytree", replaced)
        done = register(settings, task, trial)
    folder, _ = resolve(settings, NAME)
    assert (folder / "adapter_model.safetensors").read_text() == "of another" and swapped
    assert models.weights_digest(folder) == done.model.weights


def test_a_full_disk_is_no_bad_input(settings: Settings, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, to: Path) -> None:
        raise shutil.Error([(str(source), str(to), "[Errno 28] No space left on device")])

    with monkeypatch.context() as patch:
        patch.setattr(models.shutil, "copytree", full)
        with pytest.raises(MetapeftError, match="the disk is full") as error:
            register(settings, task, make_trial(1, 0.9))
    assert error.value.exit_code == 1 and list_models(settings) == []


def test_references(settings: Settings, task: Task) -> None:
    register(settings, task, make_trial(1, 0.9))
    register(settings, task, make_trial(2, 0.8))
    register(settings, task, make_trial(3, 0.8), alias="blue")
    found = {r: resolve(settings, r)[1].version for r in ("sms_spam", NAME, f"{NAME}@2", "task/sms_spam@challenger")}
    assert found == {"sms_spam": 1, NAME: 1, f"{NAME}@2": 2, "task/sms_spam@challenger": 2}
    assert resolve(settings, "sms_spam@blue")[1].version == resolve(settings, "sms_spam@v3")[1].version == 3
    with pytest.raises(
        UserError, match=r"no version or alias '9'; versions: 1, 2, 3; aliases: blue, challenger, champion"
    ):
        resolve(settings, "sms_spam@9")
    for number in ("9" * 5000, "²"):
        with pytest.raises(UserError, match="no version or alias"):
            resolve(settings, f"sms_spam@{number}")
    with pytest.raises(UserError, match=f"no registered model 'nothing'; registered: {NAME}"):
        resolve(settings, "nothing")
    register(settings, task, make_trial(4, backbone="other/model:7"))
    with pytest.raises(UserError, match="several backbones"):
        resolve(settings, "sms_spam")
    with pytest.raises(UserError, match="no version or alias"):
        promote(settings, NAME, 77)
    folder, _ = resolve(settings, NAME)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with pytest.raises(UserError, match="are gone"):
        resolve(settings, NAME)


def test_a_name_may_hold_an_at_sign(settings: Settings, task: Task) -> None:
    mails = replace(task, name="mails@2024")
    register(settings, mails, make_trial(1, 0.9, task=mails.name))
    register(settings, mails, make_trial(2, 0.8, task=mails.name))
    found = {r: resolve(settings, r)[1].version for r in ("mails@2024", "task/mails@2024@2", "mails@2024@champion")}
    assert found == {"mails@2024": 1, "task/mails@2024@2": 2, "mails@2024@champion": 1}
    with pytest.raises(UserError, match="no registered model 'mails'"):
        resolve(settings, "mails@2")


def test_an_empty_registry(settings: Settings) -> None:
    assert list_models(settings) == []
    with pytest.raises(UserError, match="none yet"):
        rollback(settings, "sms_spam")


@pytest.mark.parametrize("name", ["adapter.pkl", "model.pt", "code.py"])
def test_only_data_is_registered(settings: Settings, task: Task, name: str) -> None:
    folder = make_adapter(Path("adapter"))
    (folder / name).write_bytes(b"\x80\x04")
    with tracking.run(settings, "train") as tracker:
        with pytest.raises(UserError, match=rf"{name} is not plain data"):
            tracker.register(folder, make_trial(), task)
        with pytest.raises(UserError, match="no adapter folder"):
            tracker.register(Path("nowhere"), make_trial(), task)
        with pytest.raises(UserError, match="without a score"):
            tracker.register(folder, make_trial(status="diverged", score=None), task)
    assert list_models(settings) == []


def test_names_are_legal_and_distinct() -> None:
    from mlflow.utils.validation import _validate_model_name

    names = [
        registered_name(task, backbone)
        for task in ("sms_spam", "a/b", "a:b", "a b", "été", "x" * 400, "..")
        for backbone in ("smollm2-135m-instruct", "mlx-community/Model-4bit", "/home/me/my model")
    ]
    assert len(set(names)) == len(names) and names[0] == NAME
    for name in names:
        _validate_model_name(name)
        assert len(name) <= 200


@pytest.mark.slow
def test_adapters_on_a_server_are_downloaded_once(
    settings: Settings, task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = f"http://127.0.0.1:{port}"
    store = [
        "--backend-store-uri",
        f"sqlite:///{home() / 'mlflow.db'}",
        "--artifacts-destination",
        str(tmp_path / "remote"),
    ]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        *store,
    ]
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ}, start_new_session=True)
    try:
        wait_for(f"{where}/health", server)
        remote = replace_uri(settings, where)
        trial = make_trial(1, 0.9)
        assert register(remote, task, trial).alias == "champion"
        [found] = connect(remote.tracking).search_model_versions(f"name='{NAME}'")
        killed = home() / "models" / NAME / f".1-{found.tags['weights'][:16]}.tmp"
        killed.mkdir(parents=True)
        (killed / "adapters").write_text("half of a download")
        folder, model = resolve(remote, "sms_spam")
        assert folder.parent == home() / "models" / NAME and not model.source.startswith("/")
        assert (folder / "adapter_model.safetensors").read_text() == trial.id
        with monkeypatch.context() as patch:
            patch.setattr("mlflow.artifacts.download_artifacts", pytest.fail)
            assert resolve(remote, "sms_spam")[0] == folder
        assert [p.name for p in folder.parent.iterdir() if p.suffix != ".lock"] == [f"1-{weights_digest(folder)[:16]}"]
        connect(remote.tracking).delete_registered_model(NAME)
        other = make_trial(2, 0.9)
        assert register(remote, task, other).model.version == 1, "numbers begin again"
        again, model = resolve(remote, "sms_spam")
        assert (again / "adapter_model.safetensors").read_text() == other.id
        assert weights_digest(again) == model.weights
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the MLflow server ended"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the MLflow server did not start")
