"""A cached folder is complete or absent, whatever happens while it is made."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from metapeft.backbones import store
from metapeft.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECORD = {"id": "x", "content_id": "1"}


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(1000))


def refuse(folder: Path) -> None:
    raise AssertionError("a valid folder must not be built again")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_built_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "x"
    store.build(folder, RECORD, fill)
    manifest = store.manifest(folder)
    assert manifest is not None and manifest["id"] == "x"
    assert set(manifest["files"]) == {"config.json", "model.safetensors"}
    store.build(folder, RECORD, refuse)
    assert names(folder.parent) == ["x"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
        lambda folder: (folder / "manifest.json").write_text('{"files": ["config.json"]}'),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 1000),
    ],
)
def test_a_damaged_folder_is_made_again(tmp_path: Path, damage: object) -> None:
    folder = tmp_path / "x"
    store.build(folder, RECORD, fill)
    damage(folder)  # type: ignore[operator]
    assert store.manifest(folder) is None
    store.build(folder, RECORD, fill)
    assert store.manifest(folder) is not None and names(tmp_path) == ["x"]


def test_another_content_is_made_again(tmp_path: Path) -> None:
    store.build(tmp_path / "x", RECORD, fill)
    store.build(tmp_path / "x", {**RECORD, "content_id": "2"}, fill)
    manifest = store.manifest(tmp_path / "x")
    assert manifest is not None and manifest["content_id"] == "2" and names(tmp_path) == ["x"]


def test_a_failure_leaves_nothing_and_keeps_what_was(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise UserError("no network")

    with pytest.raises(UserError, match="no network"):
        store.build(tmp_path / "x", RECORD, fail)
    assert names(tmp_path) == []
    store.build(tmp_path / "x", RECORD, fill)
    with pytest.raises(UserError, match="no network"):
        store.build(tmp_path / "x", {**RECORD, "content_id": "2"}, fail)
    assert store.manifest(tmp_path / "x") is not None, "the older one stays until the new one is whole"


SLOW = """
import os, sys, time
from pathlib import Path
from metapeft.backbones import store

def fill(folder):
    for i in range(10):
        (folder / f"part{i}").write_bytes(os.urandom(1000))
        print(i, flush=True)
        time.sleep(0.05)

store.build(Path(sys.argv[1]), {"id": "x"}, fill)
"""


def test_killed_at_any_moment_the_next_one_succeeds(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for parts in (1, 5, 10):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(parts):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert store.manifest(folder) is None or parts == 10
    store.build(folder, RECORD, fill)
    assert store.manifest(folder) is not None and names(tmp_path) == ["x"], "the leftovers are gone too"


def _count(folder: Path, log: Path) -> None:
    def counted(temporary: Path) -> None:
        with log.open("a") as lines:
            lines.write("built\n")
        time.sleep(0.3)
        fill(temporary)

    store.build(folder, RECORD, counted)
    assert store.manifest(folder) is not None


def test_two_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(tmp_path / "x", tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*a file is in the way.*METAPEFT_HOME"):
        store.build(tmp_path / "file" / "x", RECORD, fill)


def test_a_full_disk(tmp_path: Path) -> None:
    """Files of this process may not grow beyond 100 kB: the write fails as on a full disk."""
    code = f"""
    import resource
    from pathlib import Path
    from metapeft.backbones import store
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store.build(Path({str(tmp_path / "x")!r}), {{}}, lambda folder: (folder / "big").write_bytes(bytes(10**6)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert "metapeft.errors.UserError: cannot write" in done.stderr
    assert names(tmp_path) == []


def test_a_valid_read_only_cache_is_used_without_writing(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    store.build(folder, RECORD, fill)
    (tmp_path / ".x.lock").unlink(missing_ok=True)
    store.build(folder, RECORD, refuse)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"], "not even a lock file"
    assert json.loads((folder / "manifest.json").read_text())["files"]
