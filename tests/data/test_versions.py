"""Content ids are DVC's own, with or without a repository; a repository is used, never made."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metapeft.data import versions
from metapeft.errors import UserError

DVC = [sys.executable, "-m", "dvc"]
ENVIRONMENT = {**os.environ, "DVC_NO_ANALYTICS": "1"}


def dvc(folder: Path, *arguments: str) -> str:
    run = subprocess.run([*DVC, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return run.stdout


def recorded(path: Path) -> str:
    """The content id in the .dvc file."""
    import yaml

    (out,) = yaml.safe_load(path.with_name(path.name + ".dvc").read_text())["outs"]
    return str(out["md5"])


@pytest.fixture(scope="module")
def empty_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    dvc(folder, "init", "--no-scm", "-q")
    return folder


def make_folder(folder: Path) -> Path:
    (folder / "b" / "deep").mkdir(parents=True)
    for name, content in {"train.csv": "text,label\r\né,x\r\n", "b/deep/z": "", "b.txt": "1\n", "B.txt": "2\n"}.items():
        (folder / name).write_bytes(content.encode())
    return folder


def test_the_id_is_the_one_that_dvc_gives(empty_repository: Path, tmp_path: Path) -> None:
    outside, inside = make_folder(tmp_path / "set"), make_folder(empty_repository / "set")
    dvc(empty_repository, "add", "-q", "set")
    assert versions.content_id(outside) == recorded(inside) and recorded(inside).endswith(".dir")
    assert versions.track(outside) == recorded(inside)
    assert not (tmp_path / ".dvc").exists() and not outside.with_name("set.dvc").exists()


def test_a_file_is_added_to_its_repository(empty_repository: Path) -> None:
    path = empty_repository / "data.jsonl"
    path.write_bytes(b'{"text": "a", "label": "x"}\r\n')
    identity = versions.track(path)
    assert identity == versions.content_id(path) == recorded(path)
    stored = empty_repository / ".dvc" / "cache" / "files" / "md5" / identity[:2] / identity[2:]
    assert stored.read_bytes() == path.read_bytes()
    # Content that DVC can restore is what tracking is for.
    path.unlink()
    dvc(empty_repository, "checkout", "-q", "data.jsonl.dvc")
    assert versions.content_id(path) == identity

    path.chmod(0o644)
    path.write_bytes(b"changed")
    assert versions.track(path) == recorded(path) != identity


def test_many_at_once(empty_repository: Path) -> None:
    """Each in a process of its own: DVC's lock alone makes all but one fail."""
    names = [f"part{i}.csv" for i in range(3)]
    for name in names:
        (empty_repository / name).write_text(name)
    program = (
        "import sys, pathlib; from metapeft.data import versions; print(versions.track(pathlib.Path(sys.argv[1])))"
    )

    def add(name: str) -> str:
        path = str(empty_repository / name)
        run = subprocess.run([sys.executable, "-c", program, path], env=ENVIRONMENT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(add, names))
    assert found == [recorded(empty_repository / name) for name in names]


def test_what_dvc_does_not_track_still_has_its_id(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    dvc(tmp_path, "init", "-q")
    path = tmp_path / "known.csv"
    path.write_text("text,label\n")
    subprocess.run(["git", "-C", str(tmp_path), "add", "known.csv"], check=True)  # tracked by Git: DVC refuses it
    assert versions.track(path) == versions.content_id(path)
    assert not path.with_name("known.csv.dvc").exists()


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        versions.track(tmp_path / "none.csv")


def test_killed_before_the_content_a_restore_goes_on(empty_repository: Path) -> None:
    import yaml

    path = empty_repository / "killed.csv"
    path.write_text("text,label\nfirst,a\n")
    first = versions.track(path)
    path.write_text("text,label\nsecond,a\n")
    versions.track(path)
    record = {"outs": [{"md5": first, "hash": "md5", "path": path.name}]}
    path.with_name("killed.csv.dvc").write_text(yaml.safe_dump(record))  # where a kill left it
    versions.restore(path, first)
    assert "first" in path.read_text()
    path.write_text("text,label\nmine,a\n")
    with pytest.raises(UserError, match="holds changes that DVC does not have"):
        versions.restore(path, first)
    assert "mine" in path.read_text()
