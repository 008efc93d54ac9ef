"""A folder that is whole or not there: built beside its final name, sealed by a manifest, put in place by renaming.

`manifest.json` lists size and sha256 of every file and is written last. Replacing a folder takes two renames (POSIX
cannot swap two folders in one portable step): the old one steps aside, the new one takes its name. A reader that
arrives between the two, or after a crash between them, finds the old one under its aside name, so there is always a
valid one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from metapeft.errors import UserError

MANIFEST = "manifest.json"
_STALE_SECONDS = 3600  # a half-built sibling this old has no living writer


def publish(folder: Path, files: Mapping[str, bytes], *, sealed: bool = True) -> None:
    """Writes `files` (name -> content) as the whole content of `folder`, with a manifest when `sealed`.

    An existing folder is replaced with all that is in it.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    leftovers = _asides(folder) + [path for path in _siblings(folder, "new") if _age(path) > _STALE_SECONDS]
    building = _sibling(folder, "new")
    building.mkdir()
    for name, content in files.items():
        _write(building / name, content)
    if sealed:
        _write(building / MANIFEST, _manifest(files))
    _sync(building)
    while True:
        aside = _sibling(folder, "old")
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, aside)
        try:
            os.rename(building, folder)
            break
        except OSError:  # another writer took the name in between: replace that one
            if not folder.exists():
                raise
    _sync(folder.parent)
    for path in [*leftovers, aside]:
        shutil.rmtree(path, ignore_errors=True)


def locate(folder: Path) -> Path:
    """Where `folder` is now: itself, or its aside name when its replacement was interrupted. Raises UserError."""
    folder = Path(os.path.abspath(folder))
    for _ in range(100):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UserError(f"{folder} is a file; give the folder that holds the adapter")
        if not (asides := _asides(folder)):
            time.sleep(0.001)  # a replacement may just have been finished
            if folder.is_dir():
                return folder
            raise UserError(f"there is no adapter folder {folder}; check the path")
        if asides[-1].is_dir():
            return asides[-1]
    return folder


def sealed_files(folder: Path) -> dict[str, bytes]:
    """Content of every file in the manifest, each checked against it. Raises UserError naming the first wrong file."""
    for attempt in range(3):
        place = locate(folder)
        seal = read(place / MANIFEST)
        try:
            return _checked(place, seal)
        except UserError:
            # The folder may have been replaced while it was read: then its manifest has changed too.
            if attempt == 2 or read(locate(folder) / MANIFEST) == seal:
                raise
    raise AssertionError("unreachable")


def _checked(folder: Path, seal: bytes) -> dict[str, bytes]:
    manifest = folder / MANIFEST
    try:
        entries = json.loads(seal)["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest} is not a valid manifest; the adapter was damaged, save it again") from error
    content = {}
    for name, (size, digest) in expected.items():
        if Path(name).name != name:
            raise UserError(f"{manifest} names a file outside its folder ({name!r}); do not use this adapter")
        data = read(folder / name)
        if len(data) != size:
            raise UserError(
                f"{folder / name} has {len(data)} bytes and its manifest says {size}; save the adapter again"
            )
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{folder / name} differs from its manifest (sha256); the file was changed, save it again")
        content[name] = data
    return content


def _manifest(files: Mapping[str, bytes]) -> bytes:
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(files.items())
    }
    return json.dumps({"format": 1, "files": entries}, indent=2).encode()


def read(path: Path) -> bytes:
    """Content of one file. Raises UserError naming it."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the adapter folder is incomplete, save it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.parent / f".{folder.name}.{kind}-{uuid.uuid4().hex[:12]}"


def _siblings(folder: Path, kind: str) -> list[Path]:
    """Oldest first."""
    start = f".{folder.name}.{kind}-"
    if not folder.parent.is_dir():
        return []
    found = [path for path in folder.parent.iterdir() if path.name.startswith(start)]
    return sorted(found, key=_age, reverse=True)


def _asides(folder: Path) -> list[Path]:
    return _siblings(folder, "old")


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
