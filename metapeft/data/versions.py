"""Versions of data files by DVC: the content id that later records carry, and tracking inside a DVC repository."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from metapeft.errors import MetapeftError, UserError

T = TypeVar("T")

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

    try:
        return with_repository(root, lambda repo: str(repo.add(str(path))[0].outs[0].hash_info.value))
    except DvcException as error:
        log.info("not added to DVC: %s", error)
        return computed
    except OSError as error:
        log.warning("%s was not added to DVC (%s); its content id is recorded all the same", path, error)
        return computed


def tracked(path: Path) -> str | None:
    """The content id in the path's .dvc file, what DVC has of it. None: there is no such file."""
    import yaml

    file = path.with_name(path.name + ".dvc")
    try:
        (out,) = yaml.safe_load(file.read_text(encoding="utf-8"))["outs"]
        return str(out["md5"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {file} ({error}); restore it from Git, or delete it and try again") from error


def push(path: Path) -> int:
    """Copies what DVC tracks at `path` to the repository's default remote; returns how many files were new there.

    0 where no remote is configured. Raises MetapeftError when the remote cannot be written.
    """
    root = repository(path.absolute())
    if root is None:
        return 0
    from dvc.exceptions import DvcException

    def do(repo: Any) -> int:
        if not repo.config["core"].get("remote"):
            return 0
        return int(repo.push(targets=[f"{path.absolute()}.dvc"]))

    try:
        return with_repository(root, do)
    except (DvcException, OSError) as error:
        raise MetapeftError(f"DVC could not push {path}: {error}; see `dvc remote list`") from error


def restore(path: Path, identity: str) -> None:
    """Puts the content with that id at `path`, from DVC's cache or remote. Raises UserError when neither has it.

    The .dvc file says so afterwards, as `dvc add` would have written it.
    """
    path = path.absolute()
    root = repository(path)
    if root is None:
        raise UserError(f"{path} is in no DVC repository; run `dvc init` there, or choose another folder")
    import yaml
    from dvc.exceptions import DvcException

    here = content_id(path) if path.exists() else identity
    # A kill may have come between the .dvc file and the content: then DVC has what lies here.
    if here not in (identity, tracked(path)) and not with_repository(root, lambda repo: repo.cache.local.exists(here)):
        raise UserError(f"{path} holds changes that DVC does not have; run `dvc add {path.name}`, or move it away")
    record = path.with_name(path.name + ".dvc")
    before = record.read_bytes() if record.exists() else None
    wanted = {"outs": [{"md5": identity, "hash": "md5", "path": path.name}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(record, yaml.safe_dump(wanted, sort_keys=False).encode())

    def check_out(repo: Any) -> None:
        repo.checkout(targets=[str(record)], force=True)

    def fetch(repo: Any) -> None:
        if repo.config["core"].get("remote"):
            repo.fetch(targets=[str(record)])
        check_out(repo)

    try:
        with_repository(root, fetch)
    except (DvcException, OSError) as error:
        if before is None:
            record.unlink()
        else:
            _replace(record, before)
            with_repository(root, check_out)
        raise UserError(f"neither DVC's cache nor its remote has {identity}; `dvc push` it from where it is") from error


def fetch(identity: str, destination: Path, root: Path) -> None:
    """Copies the content with that id from the cache or the remote of the repository `root` to `destination`.

    Raises UserError when neither has it. `destination` must not exist.
    """
    import shutil

    from dvc.exceptions import DvcException
    from dvc_data.hashfile.hash_info import HashInfo

    def cached(repo: Any, wanted: str) -> Path:
        store = repo.cache.local
        if not store.exists(wanted) and repo.config["core"].get("remote"):
            repo.cloud.pull([HashInfo("md5", wanted)])
        place = Path(store.oid_to_path(wanted))
        if not place.exists():
            raise FileNotFoundError(wanted)
        return place

    def copy(repo: Any) -> None:
        temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            if identity.endswith(".dir"):
                for item in json.loads(cached(repo, identity).read_text(encoding="utf-8")):
                    (temporary / item["relpath"]).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(cached(repo, item["md5"]), temporary / item["relpath"])
            else:
                shutil.copyfile(cached(repo, identity), temporary)
            os.rename(temporary, destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if temporary.is_file():
                temporary.unlink()

    try:
        with_repository(root, copy)
    except (DvcException, OSError) as error:
        raise UserError(
            f"neither DVC's cache in {root} nor its remote has {identity} ({error}); `dvc push` it from where it is"
        ) from error


def with_repository(root: Path, do: Callable[[Any], T]) -> T:
    """`do(dvc.repo.Repo)`, one after another with whoever else wants the repository.

    Raises UserError when a `dvc` command keeps it locked for a minute.
    """
    from dvc.lock import LockError
    from dvc.logger import set_loggers_level
    from dvc.repo import Repo
    from filelock import FileLock, Timeout

    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            # DVC's own lock makes all but one of several commands fail: ours queues them.
            with (
                set_loggers_level(logging.CRITICAL),  # what goes wrong comes as an exception
                FileLock(root / ".dvc" / "tmp" / "metapeft-add.lock", timeout=LOCK_SECONDS),
                Repo(str(root)) as repo,
            ):
                return do(repo)
        except (LockError, Timeout):  # a `dvc` command is at work
            if time.monotonic() > deadline:
                raise UserError(
                    f"the DVC repository {root} stays locked; wait for the running dvc command, then try again"
                ) from None
            time.sleep(0.2)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


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
