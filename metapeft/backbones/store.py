"""Folders that are either complete or absent: written beside their final name, manifest last, renamed when done.

A folder under `METAPEFT_HOME/backbones` is valid when its `manifest.json` names every file with its sha256 and the
files match. Anything else (killed half-way, damaged later, made by an older version) is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metapeft.errors import UserError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest if every file it names is there with the recorded sha256, else None."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = record["files"]
        whole = bool(files) and all(sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if whole else None


def build(folder: Path, record: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Make `folder`: `fill(temporary)` writes its files, then the manifest (`record` and the digests) makes it valid.

    One process builds at a time and the others wait for it; who finds the folder valid with the same `record` keeps it.
    Raises UserError when the disk is full or not writable; whatever `fill` raises passes, and leaves nothing behind.
    """
    if _holds(folder, record):  # before anything is written: a complete cache may be read-only
        return
    with _writable(folder), _locked(folder):
        if _holds(folder, record):  # somebody else has just built it
            return
        _sweep(folder)
        temporary = folder.with_name(f".{folder.name}.building-{os.getpid()}")
        try:
            temporary.mkdir()
            fill(temporary)
            files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
            text = json.dumps({**record, "files": files}, indent=2) + "\n"
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
            for path in temporary.iterdir():
                _flush(path)
            if folder.exists():  # invalid, or made by an older version
                os.replace(folder, folder.with_name(f".{folder.name}.old-{os.getpid()}"))
            os.replace(temporary, folder)
            _flush(folder.parent)
        finally:
            _sweep(folder)


def _holds(folder: Path, record: dict[str, Any]) -> bool:
    found = manifest(folder)
    return found is not None and record.items() <= found.items()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # the kernel releases it if the holder is killed
        yield


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        blocked = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the way" if blocked else error.strerror or error
        raise UserError(
            f"cannot write {folder} ({reason}); set METAPEFT_HOME to a writable folder with 1 GB free"
        ) from error


def _sweep(folder: Path) -> None:
    """Remove what builds that were killed left behind (only ever called with the lock held)."""
    for kind in ("building", "old"):
        for leftover in folder.parent.glob(f".{folder.name}.{kind}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _flush(path: Path) -> None:
    """Down to the disk, so that a power cut cannot leave a renamed folder with empty files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
