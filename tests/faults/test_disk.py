"""A disk that is full at any point, or read-only: one sentence, nothing lost, and with space again the run goes on.

The points are those of the kills, refused with ENOSPC from there on; a small tmpfs and a read-only one (as root, on
Linux) say the same without any help of ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from metapeft.errors import disk
from tests.faults.pipeline import STAGES, Pipeline, empty
from tests.faults.sound import check

pytestmark = pytest.mark.timeout(3600)
EVERY = int(os.environ.get("METAPEFT_FAULT_EVERY", "1"))
KB = 1024


def refused(ended: Any, where: str) -> None:
    """It said so, in one sentence, with the exit code of a failure."""
    assert ended.code in (1, 2), f"{where}: {ended.code}\n{ended.err}"
    assert "--debug" not in ended.error, f"{where}: {ended.error}"
    check(ended.error)


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_full_from_any_point_on(pipeline: Pipeline, stage: str, tmp_path: Path, figure: Any) -> None:
    tried, at = 0, 1
    while True:
        pipeline.restore(stage)
        acks = tmp_path / f"acks-{at}"
        ended = pipeline.run(stage, "full", at, acks)
        where = f"full from point {at} of {stage} on: {ended.points[at - 1] if len(ended.points) >= at else ''}"
        if len(ended.points) < at:
            break
        if ended.code:
            refused(ended, where)
        given = set(acks.read_text().splitlines()) if acks.exists() else set()
        again = pipeline.recover(stage)
        assert again.code == 0 and again.result["code"] == 0, f"{where}\n{again.err}"
        assert given <= set(again.result["before"]), where
        assert pipeline.outcome(stage) == pipeline.outcomes[stage], where
        tried, at = tried + 1, at + EVERY
    figure(f"{stage}: the disk full from {tried} points on")


@contextmanager
def tmpfs(place: Path, kilobytes: int) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def used(place: Path) -> int:
    """KiB of a mounted disk."""
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // KB


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("stage", STAGES)
def test_a_small_disk_and_a_read_only_one(pipeline: Pipeline, stage: str, figure: Any) -> None:
    empty(pipeline.now)
    said = 0
    with tmpfs(pipeline.now, 64 * KB):
        for spare in (4, 32, 128):
            empty(pipeline.now)
            remount(pipeline.now, f"size={64 * KB}k")
            shutil.copytree(pipeline.base / "before" / stage, pipeline.now, dirs_exist_ok=True)
            remount(pipeline.now, f"size={used(pipeline.now) + spare}k")
            ended = pipeline.run(stage)
            if ended.code:
                said += 1
                refused(ended, f"{stage} with {spare} KiB to spare")
            remount(pipeline.now, f"size={64 * KB}k")
            again = pipeline.recover(stage)
            assert again.code == 0 and again.result["code"] == 0, again.err
            assert pipeline.outcome(stage) == pipeline.outcomes[stage]
        empty(pipeline.now)
        shutil.copytree(pipeline.base / "before" / stage, pipeline.now, dirs_exist_ok=True)
        remount(pipeline.now, "ro")
        refused(pipeline.run(stage), f"{stage} on a read-only disk")
        remount(pipeline.now, "rw")
        assert pipeline.run(stage).code == 0
    figure(f"{stage}: refused {said} of 3 times on a tmpfs with 4, 32 and 128 KiB to spare, and once read-only")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/x/y"), "the disk is full at /x/y"),
        (OSError(30, "Read-only file system", "/x"), "cannot write at /x"),
        (PermissionError(13, "Permission denied", "/x"), "cannot write at /x"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "the disk is full;"),
        (RuntimeError("attempt to write a readonly database"), "cannot write ("),
    ],
)
def test_what_is_said_of_a_disk(error: Exception, words: str) -> None:
    wrapped = RuntimeError("something failed")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        found = disk(one)
        assert found is not None and found.startswith(words)
        check(found)
    for blocked in (NotADirectoryError(20, "Not a directory", "/x/y"), FileExistsError(17, "File exists", "/x/y")):
        assert (disk(blocked) or "").startswith("cannot make the folder /x/y: a file is in the way; move it")
    assert disk(ValueError("no")) is None and disk(FileNotFoundError(2, "No such file", "/x")) is None
