"""Task files under DVC, in a real repository with a remote: versions come, go and come back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metapeft.data import incoming, versions
from metapeft.errors import MetapeftError, UserError
from tests.stages.made import spam_file, spam_rows


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Git and DVC repository with a remote beside it, made once."""
    folder = tmp_path_factory.mktemp("made") / "project"
    folder.mkdir()
    run(folder, "git", "init", "-q")
    dvc = (sys.executable, "-m", "dvc")
    run(folder, *dvc, "init", "-q")
    run(folder, *dvc, "remote", "add", "-q", "-d", "store", "../remote")
    return folder


@pytest.fixture
def project(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(empty, folder)
    (folder / "data").mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.unlink(missing_ok=True)  # DVC may have linked it to its cache
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_new_version_is_stored_here_and_in_the_remote_and_comes_back(project: Path) -> None:
    file = spam_file(project / "data")
    first = incoming.version(Path("data/spam.jsonl"))
    assert first.changed and first.pushed == 1 and first.rows == 80 and first.task == "spam"
    assert versions.tracked(file) == first.dvc_id == versions.content_id(file)
    again = incoming.version(file)
    assert (again.changed, again.pushed, again.dvc_id) == (False, 0, first.dvc_id)
    assert "/spam.jsonl" in (project / "data/.gitignore").read_text().split()

    write(file, spam_rows(90))
    second = incoming.version(file)
    assert second.changed and second.pushed == 1 and second.version != first.version
    assert second.dvc_id != first.dvc_id

    shutil.rmtree(project / ".dvc/cache")  # the remote alone has them
    versions.restore(file, first.dvc_id)
    assert versions.content_id(file) == first.dvc_id == versions.tracked(file)
    assert not incoming.version(file).changed


def test_restoring_spares_what_dvc_does_not_have_and_says_what_is_lost(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = spam_file(project / "data")
    known = incoming.version(file).dvc_id
    write(file, spam_rows(50))
    with pytest.raises(UserError, match="holds changes that DVC does not have"):
        versions.restore(file, known)
    incoming.version(file)
    mine, record = file.read_bytes(), file.with_name("spam.jsonl.dvc").read_bytes()
    with pytest.raises(UserError, match="neither DVC's cache nor its remote has"):
        versions.restore(file, "0" * 32)
    assert file.read_bytes() == mine and file.with_name("spam.jsonl.dvc").read_bytes() == record
    assert not [r.getMessage() for r in caplog.records if r.name.startswith("dvc")]  # one sentence, not two


def test_a_broken_file_is_not_versioned(project: Path) -> None:
    file = spam_file(project / "data")
    known = incoming.version(file).dvc_id
    write(file, [{"text": "only one", "label": "ham"}])
    with pytest.raises(UserError):
        incoming.version(file)
    assert versions.tracked(file) == known


def test_what_dvc_cannot_keep(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        incoming.version(Path("data/none.jsonl"))
    outside = spam_file(tmp_path)
    with pytest.raises(UserError, match="in no DVC repository"):
        incoming.version(outside)
    file = spam_file(project / "data")
    run(project, "git", "add", "data/spam.jsonl")
    with pytest.raises(UserError, match=r"Git or dvc.yaml has it"):
        incoming.version(file)


def test_the_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from metapeft import cli

    spam_file(project / "data")
    assert cli.main(["tasks", "version", "data/spam.jsonl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changed"] and found["file"] == "data/spam.jsonl"
    assert cli.main(["tasks", "version", "data/spam.jsonl"]) == 0
    assert "False" in capsys.readouterr().out


def test_what_could_not_be_pushed_is_new_to_the_next_call(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failed before it could tell anybody."""
    file = spam_file(project / "data")

    def away(path: Path) -> int:
        raise MetapeftError("the remote is away")

    with monkeypatch.context() as patch, pytest.raises(MetapeftError, match="away"):
        patch.setattr(versions, "push", away)
        incoming.version(file)
    again = incoming.version(file)
    assert again.changed and again.pushed == 1
    assert not incoming.version(file).changed
