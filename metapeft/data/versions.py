"""Versions of data files by DVC: the content id that later records carry, and tracking inside a DVC repository."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

from metapeft.errors import UserError

LOCK_SECONDS = 60.0
log = logging.getLogger(__name__)


def track(path: Path) -> str:
    """DVC's content id of a file or folder; inside a DVC repository it is also added to it (`dvc add`).

    Never makes a repository: without one, or where DVC does not track the path (an output of a stage, ignored by Git,
    tracked by Git), the id is computed from the content, and is the same. Safe to call from several processes.
    Raises UserError when the path cannot be read.
    """
    path = path.absolute()
    computed = content_id(path)
    root = repository(path)
    if root is None:
        return computed

    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from filelock import FileLock, Timeout

    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            # DVC's own lock makes all but one of several adds fail: ours queues them.
            with FileLock(root / ".dvc" / "tmp" / "metapeft-add.lock", timeout=LOCK_SECONDS), Repo(str(root)) as repo:
                return str(repo.add(str(path))[0].outs[0].hash_info.value)
        except (LockError, Timeout):  # a `dvc` command is at work
            if time.monotonic() > deadline:
                raise UserError(
                    f"the DVC repository {root} stays locked; wait for the running dvc command, then try again"
                ) from None
            time.sleep(0.2)
        except DvcException as error:
            log.info("not added to DVC: %s", error)
            return computed
        except OSError as error:
            log.warning("%s was not added to DVC (%s); its content id is recorded all the same", path, error)
            return computed


def content_id(path: Path) -> str:
    """The id that `dvc add` (format 3) gives: the md5 of a file; for a folder the md5 of its JSON listing, plus ".dir".

    The listing is a list of {"md5", "relpath"} sorted by path (dvc_data.hashfile.tree.Tree); `.dvcignore` is not read.
    Raises UserError when the path cannot be read.
    """
    try:
        if not path.is_dir():
            return file_md5(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = [{"md5": file_md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    listing.sort(key=lambda item: item["relpath"])
    return md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def file_md5(path: Path) -> str:
    digest = md5()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def md5(data: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(data, usedforsecurity=False)  # DVC's choice; an identity, not a protection


def repository(path: Path) -> Path | None:
    """The DVC repository that holds `path`, if there is one on the same file system."""
    for folder in path.parents:
        if (folder / ".dvc").is_dir():
            return folder
        if os.path.ismount(folder):
            break
    return None
