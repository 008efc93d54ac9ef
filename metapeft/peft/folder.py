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
import stat
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from metapeft.errors import UserError

T = TypeVar("T")
MANIFEST = "manifest.json"
_STALE_SECONDS = 3600  # a half-built sibling this old has no living writer


def publish(folder: Path, files: Mapping[str, bytes], *, sealed: bool = True) -> None:
    """Writes `files` (name -> content) as the whole content of `folder`, with a manifest when `sealed`.

    An existing folder is replaced with all that is in it. Raises UserError when its name is taken by a file.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_file():
        raise UserError(f"{folder} is a file; choose another name for the adapter folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    leftovers = _asides(folder) + _siblings(folder, "gone")
    leftovers += [path for path in _siblings(folder, "new") if _age(path) > _STALE_SECONDS]
    for left in (2, 1, 0):
        building = _sibling(folder, "new")
        try:
            _build(building, files, sealed)
            _put(building, folder, leftovers)
            break
        except FileNotFoundError:  # a writer whose clock had jumped took ours for a dead one's: write it again
            if not left:
                raise
        except OSError:
            shutil.rmtree(building, ignore_errors=True)  # a full disk must not get fuller
            raise
    _sync(folder.parent)
    for path in leftovers:
        _remove(path, _sibling(folder, "gone"))


def _build(building: Path, files: Mapping[str, bytes], sealed: bool) -> None:
    building.mkdir()
    for name, content in files.items():
        _write(building / name, content)
    if sealed:
        _write(building / MANIFEST, _manifest(files))
    _sync(building)


def _put(building: Path, folder: Path, aside: list[Path]) -> None:
    """Gives what was built its name; adds to `aside` where the folders before it stepped."""
    while True:
        aside.append(_sibling(folder, "old"))
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, aside[-1])
        try:
            os.rename(building, folder)
            return
        except OSError:  # another writer took the name in between: replace that one
            if not folder.exists():
                raise


def locate(folder: Path) -> Path:
    """Where `folder` is now: itself, or its aside name when its replacement was interrupted. Raises UserError."""
    folder = Path(os.path.abspath(folder))
    for _ in range(5):  # the folder may be in the middle of its replacement at each look
        if (mode := _mode(folder)) is not None:
            if not stat.S_ISDIR(mode):
                raise UserError(f"{folder} is a file; give the folder that holds the adapter")
            return folder
        if asides := _asides(folder):
            return asides[-1]
        time.sleep(0.002)
    raise UserError(f"there is no adapter folder {folder}; check the path")


def stable(folder: Path, work: Callable[[Path], T]) -> T:
    """`work` on the place of `folder`, done again when the folder was replaced meanwhile."""
    for _ in range(100):
        place = locate(folder)
        before = _identity(place)
        try:
            result = work(place)
        except UserError:
            if before is not None and before == _identity(locate(folder)):
                raise
            continue
        if before is not None and before == _identity(locate(folder)):
            return result
    return work(locate(folder))


def sealed_files(place: Path) -> dict[str, bytes]:
    """Content of every file in the manifest, each checked against it. Raises UserError naming the first wrong file."""
    manifest = place / MANIFEST
    try:
        entries = json.loads(read(manifest))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{manifest} is not a valid manifest; the adapter was damaged, save it again") from error
    content = {}
    for name, (size, digest) in expected.items():
        if Path(name).name != name or name == "..":
            raise UserError(f"{manifest} names a file outside its folder ({name!r}); do not use this adapter")
        data = read(place / name)
        if len(data) != size:
            raise UserError(
                f"{place / name} has {len(data)} bytes and its manifest says {size}; save the adapter again"
            )
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{place / name} differs from its manifest (sha256); the file was changed, save it again")
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


def _remove(path: Path, gone: Path) -> None:
    """Deletes a folder under another name: what is called an aside is always whole."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _identity(place: Path) -> tuple[Path, int, int] | None:
    """Tells one folder of a name from the next, and from itself after it stepped aside. None: it is gone, which is not
    the same as gone another time."""
    try:
        found = place.stat()
    except FileNotFoundError:
        return None
    return place, found.st_ino, found.st_mtime_ns


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
