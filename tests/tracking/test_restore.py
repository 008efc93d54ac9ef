"""From a registered model back to its code, parameters and data, in a real Git and DVC repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from metapeft import cli, tracking
from metapeft.data import incoming, load_task, versions
from metapeft.errors import UserError
from metapeft.meta.experience import Experience
from metapeft.settings import Settings, home
from metapeft.tracking import knowledge
from metapeft.tracking.models import resolve
from metapeft.tracking.restore import restore
from tests.stages.made import spam_file, spam_rows
from tests.tracking.made import make_adapter, make_trial


def run(*words: str, cwd: Path | None = None) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def commit(message: str) -> str:
    run("git", "add", "--all")
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-q", "-m", message)
    return run("git", "rev-parse", "HEAD")


@pytest.fixture
def project(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a remote. `settings` gives it an MLflow database."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    dvc = (sys.executable, "-m", "dvc")
    run("git", "init", "-q")
    run(*dvc, "init", "-q")
    run(*dvc, "remote", "add", "-q", "-d", "store", "../remote")
    (folder / "data").mkdir()
    (folder / "code.py").write_text("version = 1\n")
    return folder


def trained(settings: Settings, file: Path) -> Settings:
    """Registers a model as the stage `register` does; returns the settings that it was made with."""
    made = settings.model_copy(update={"task": str(file), "seed": 7})
    task = load_task(str(file), made.data)
    trial = replace(make_trial(), task=task.name, task_version=task.version)
    with tracking.run(made, task.name) as tracker:
        tracker.log_task(task)
        tracker.log_json(made.model_dump(mode="json"), "settings.json")
        tracker.register(make_adapter(Path("../adapter")), trial, task)
    return made


def test_code_parameters_and_data_come_back_though_all_of_them_have_changed(
    settings: Settings, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path("data/spam.jsonl")
    spam_file(project / "data")
    identity = incoming.version(file).dvc_id
    first = commit("first")
    made = trained(settings, file)

    file.unlink()
    file.write_text("".join(json.dumps(row) + "\n" for row in spam_rows(90, seed=5)))
    incoming.version(file)
    (project / "code.py").write_text("version = 2\n")
    commit("second")
    shutil.rmtree(".dvc/cache")  # only the remote has the old data

    assert cli.main(["models", "restore", "spam", "../back", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    back = project.parent / "back"
    assert found["commit"] == first == run("git", "rev-parse", "HEAD", cwd=back)
    assert (back / "code.py").read_text() == "version = 1\n"
    assert versions.content_id(back / "data/spam.jsonl") == identity == found["dvc_id"]
    params = yaml.safe_load((back / "params.yaml").read_text())
    assert params == made.model_dump(mode="json") | {"task": "data/spam.jsonl"}
    assert (back / "model" / "adapter_model.safetensors").read_text() == "weights"
    assert found["warnings"] == [] and found["data"].startswith("DVC")
    with pytest.raises(UserError, match="is not empty"):
        restore(settings, "spam", back)


def test_what_cannot_be_restored_is_said_and_leaves_nothing(settings: Settings, project: Path) -> None:
    file = Path("data/spam.jsonl")
    spam_file(project / "data")
    commit("first")
    (project / "code.py").write_text("not committed\n")
    trained(settings, file)  # DVC never saw the file
    found = restore(settings, "spam@1", Path("../dirty"))
    assert "in no commit" in found.warnings[0] and found.data.endswith("unchanged")
    file.write_text("".join(json.dumps(row) + "\n" for row in spam_rows(90, seed=5)))
    with pytest.raises(UserError, match="neither DVC's cache"):
        restore(settings, "spam", Path("../lost"))
    assert not Path("../lost").exists()
    assert run("git", "worktree", "list").count("\n") == 1, "the project and the folder that was restored"


def test_a_run_without_settings_and_weights_that_are_others_are_told(settings: Settings, project: Path) -> None:
    file = Path("data/spam.jsonl")
    spam_file(project / "data")
    commit("first")
    trained(settings, file)
    folder, model = resolve(settings, "spam")
    weights = folder / "adapter_model.safetensors"
    weights.write_text("others")
    with pytest.raises(UserError, match="are not those registered"):
        restore(settings, "spam", Path("../other"))
    weights.write_text("weights")
    (folder.parents[1] / "settings.json").unlink()
    with pytest.raises(UserError, match=f"run {model.run_id} of {model.name} has lost its settings"):
        restore(settings, "spam", Path("../lost"))
    assert not Path("../other").exists() and not Path("../lost").exists()


def test_experience_and_meta_models_are_versioned_registered_and_come_back(
    settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metapeft.meta import versions as meta_versions
    from metapeft.tracking.client import connect
    from tests.meta.synthetic import world

    observations = world(8).observations()
    Experience().append(make_trial(1))
    empty = knowledge.snapshot(settings, Path("knowledge"))
    assert (empty.trials, empty.meta_model, empty.registered, empty.changed) == (1, 0, None, True)
    meta_versions.train(observations)
    meta_versions.promote(1)
    meta_versions.train(observations[:-1])
    meta_versions.promote(1)
    Experience().append(make_trial(2))
    killed = Path(".knowledge.tmp/meta")
    killed.mkdir(parents=True)
    (killed / "half").touch()
    full = knowledge.snapshot(settings, Path("knowledge"))
    assert not killed.parent.exists() and not list(Path("knowledge").rglob("half"))
    assert (full.trials, full.meta_model, full.changed) == (2, 1, True) and full.pushed > 0
    again = knowledge.snapshot(settings, Path("knowledge"))
    assert (again.dvc_id, again.changed, again.pushed) == (full.dvc_id, False, 0)

    client = connect(settings.tracking)
    aliases = client.get_registered_model("meta-model").aliases
    numbers = {alias: client.get_model_version("meta-model", v).tags["number"] for alias, v in aliases.items()}
    assert numbers == {"champion": "1", "challenger": "2"}
    meta_versions.promote(2)
    assert knowledge.register(settings) == int(aliases["challenger"])
    assert len(client.search_model_versions("name = 'meta-model'")) == 2

    shutil.rmtree("knowledge")
    shutil.rmtree(".dvc/cache")
    monkeypatch.setenv("METAPEFT_HOME", str(home().parent / "elsewhere"))
    copy = shutil.copyfile

    def killed(source: Any, target: Any, **options: Any) -> Any:
        if Path(source).name == "0002.json":
            raise KeyboardInterrupt
        return copy(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(knowledge.shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            knowledge.restore(Path("knowledge"))
    assert meta_versions.champion().number == 0
    assert knowledge.restore(Path("knowledge")) == {"trials": 0, "meta_models": 2, "dvc_id": full.dvc_id}
    assert meta_versions.champion().number == 1
    assert {t.id for t in Experience(shipped=None).trials()} == {make_trial(1).id, make_trial(2).id}
    assert knowledge.restore(Path("knowledge"), empty.dvc_id)["trials"] == 0
