"""The experience: every trial ever run here, on top of the experience that ships with the package.

Each process appends to a segment file of its own, one JSON line per trial, in one `write` followed by `fsync`. kill -9
can tear only the line being written, and a line that does not hold a whole trial is passed over. `compact` moves
finished segments into one Parquet table, as soon as there are more than SEGMENTS. A trial that was recorded twice (same
id) counts once: one that was finished and tested before one that was not, then the user's own before the shipped one,
then the one that started later.

    experience/segments/HOST-PID-….jsonl    being appended to, or not yet compacted
    experience/experience.parquet           compacted
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import math
import os
import platform
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from metapeft.errors import MetapeftError, UserError
from metapeft.files import finite
from metapeft.peft.base import METHODS
from metapeft.settings import brief, home
from metapeft.training.trial import Score, Status, Trial

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Record = dict[str, Any]

SCHEMA = 1
SEGMENTS = 50
MIGRATIONS: dict[
    int, Callable[[Record], Record]
] = {}  # schema version -> what turns its records into the next version's
SHIPPED = Path(__file__).parent / "shipped"

_FIELDS = tuple(f.name for f in fields(Trial))
_SCORES = ("score", "validation", "untuned_score")
_PARTS = tuple(f.name for f in fields(Score) if f.name != "value")
_COLUMNS = {name: tuple((part, f"{name}_{part}") for part in _PARTS) for name in _SCORES}
_JSON = ("configuration", "curve", "versions")
_INTEGERS = ("seed", "budget", "tokens", "trained_parameters", "adapter_bytes", "train_examples")
_FLOATS = ("seconds", "train_seconds", "cpu_seconds", "peak_memory_mb")
_TEXTS = tuple(name for name in _FIELDS if name not in (*_SCORES, *_JSON, *_INTEGERS, *_FLOATS))
_DEFAULTS = {f.name: f.default for f in fields(Trial) if f.default is not MISSING}
_log = logging.getLogger(__name__)
_log.setLevel(logging.WARNING)  # commands quieten what libraries say; this is of the user's own trials

# Process id and folder -> file descriptor. A forked child inherits the table, but not its parent's segment.
_open_segments: dict[tuple[int, Path], int] = {}
_appending = threading.RLock()


class Experience:
    """The store in `folder` (default METAPEFT_HOME/experience), with the read-only `shipped` tables beneath it.

    All stores of one folder in one process append to one segment.
    """

    def __init__(self, folder: Path | None = None, shipped: Path | None = SHIPPED):
        self.folder = home() / "experience" if folder is None else Path(folder)
        self.shipped = shipped
        self._read: dict[Path, tuple[tuple[int, ...], list[Record]]] = {}  # by path: what it looked like, what it held

    def append(self, trial: Trial) -> None:
        """Record one trial; it is on disk when this returns. Raises UserError when the folder cannot be written."""
        self.extend([trial])

    def extend(self, trials: Iterable[Trial]) -> None:
        """Record several trials with one write."""
        self._write([_record(trial) for trial in trials])

    def trials(self) -> list[Trial]:
        """Every trial once, in the order of the seconds in which they started."""
        return [_trial(record) for record in self._records()]

    def state(self) -> tuple[tuple[str, int, int], ...]:
        """Changes whenever the trials may have changed: cheap to ask, for whoever keeps what was made of them."""
        beneath = sorted(self.shipped.glob("*.parquet")) if self.shipped is not None else []
        found = []
        for path in (*self._segments(), *self._tables(), *beneath):
            try:
                looks = path.stat()
            except FileNotFoundError:
                continue  # compacted since
            found.append((str(path), looks.st_size, looks.st_mtime_ns))
        return tuple(found)

    def frame(self) -> pd.DataFrame:
        """One row per trial. Scores become columns such as `score`, `score_standard_error`, `score_loss`; every
        hyperparameter a column such as `configuration.learning_rate`; `curve` and `versions` hold Python objects."""
        import pandas as pd

        records = self._records()
        frame = _table(records).to_pandas().drop(columns=["schema", "configuration"])
        for name in ("curve", "versions"):
            frame[name] = [record[name] for record in records]
        keys = dict.fromkeys(key for record in records for key in record["configuration"])
        values = {f"configuration.{key}": [record["configuration"].get(key) for record in records] for key in keys}
        whole: pd.DataFrame = pd.concat([frame, pd.DataFrame(values, index=frame.index)], axis=1)
        return whole

    def compact(self) -> Path:
        """Move the segments that nobody is writing into the Parquet table; returns its path. One with a line that is no
        trial stays as it is: a later metapeft, or a person, may read more of it. Raises UserError, and changes nothing,
        where a row of the table is none."""
        from filelock import FileLock

        self.close()
        target = self.folder / "experience.parquet"
        with self._writable():
            (self.folder / "segments").mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "compact.lock"), _unused(self._segments()) as segments:
                whole: dict[Path, list[Record]] = {}
                for path in segments:
                    with suppress(UserError):
                        whole[path] = _load(path, refuse=True)
                if whole or not target.exists():
                    tables = [record for path in self._tables() for record in _load(path, refuse=True)]
                    _write_table(_table(_unique([(0, [*chain(*whole.values()), *tables])])), target)
                    for path in whole:
                        path.unlink()
        return target

    def export(self, path: Path) -> int:
        """Write the user's own trials to one .parquet or .jsonl file; returns how many."""
        records = self._records(shipped=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                _write_table(_table(records), path)
            elif path.suffix == ".jsonl":
                with _replacing(path) as temporary:
                    temporary.write_bytes(b"".join(_line(record) for record in records))
            else:
                raise UserError(f"cannot export to {path.name}: give a name that ends in .parquet or .jsonl")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}); give a place you may write to") from error
        return len(records)

    def merge(self, path: Path) -> int:
        """Take over the trials of a .parquet or .jsonl file, or of an experience's folder; returns how many were new.

        Trials of which a record is here that counts as much or more (see above) are left alone. Raises UserError naming
        the line of a file that does not hold a trial, and then takes over none.
        """
        if path.is_dir():
            holds = [folder for folder in (path, path / "experience") if Experience(folder, shipped=None).state()]
            if not holds:
                raise UserError(
                    f"{path} holds no experience: neither segments/ nor a .parquet file; give one that does"
                )
            other = Experience(holds[0], shipped=None)._records()
        elif path.is_file() and path.suffix in (".parquet", ".jsonl"):
            other = _load(path, refuse=True)
        else:
            raise UserError(f"cannot import {path}: give an existing .parquet or .jsonl file, or an experience folder")
        return self._take(other)

    def add(self, records: Iterable[Record]) -> int:
        """The same for trials as JSON (`Trial.to_json`, NaN being null), of any schema; those that do not hold one are
        passed over with a warning: whoever imports from a store that many write into cannot mend it."""
        return self._take(_kept(((brief(record.get("id"), 40), record) for record in records), "record"))

    def _take(self, records: list[Record]) -> int:
        mine = {record["id"]: _rank(record) for record in self._records(shipped=False)}
        other = _unique([(0, records)])
        new = [record for record in other if record["id"] not in mine or mine[record["id"]] < _rank(record)]
        self._write([finite(record) for record in new])
        return len(new)

    @staticmethod
    def write(trials: Iterable[Trial], path: Path) -> None:
        """A Parquet table of these trials, such as `merge` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_table(_table([_record(trial) for trial in trials]), path)

    def close(self) -> None:
        """Finish this process's segment (a later append starts another)."""
        with _appending:
            file = _open_segments.pop((os.getpid(), self.folder.absolute()), None)
            if file is not None:
                os.close(file)

    def _records(self, shipped: bool = True) -> list[Record]:
        # Segments before the table: what a compaction moves in between is then seen twice, never missed.
        own: list[Record] = []
        for path in self._segments():
            try:
                own += self._load(path)
            except FileNotFoundError:
                continue  # compacted since
        for path in self._tables():
            own += self._load(path)
        beneath = sorted(self.shipped.glob("*.parquet")) if shipped and self.shipped is not None else []
        return _unique([(0, [record for path in beneath for record in self._load(path)]), (1, own)])

    def _segments(self) -> list[Path]:
        return sorted((self.folder / "segments").glob("*.jsonl"))

    def _tables(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def _load(self, path: Path) -> list[Record]:
        state = path.stat()
        looks = (state.st_ino, state.st_size, state.st_mtime_ns)
        if self._read.get(path, ((), []))[0] != looks:
            self._read[path] = (looks, _load(path))
        return self._read[path][1]

    def _write(self, records: list[Record]) -> None:
        if not records:
            return
        data = b"".join(_line(record) for record in records)
        if (os.getpid(), self.folder.absolute()) not in _open_segments and len(self._segments()) > SEGMENTS:
            with suppress(MetapeftError):  # what is to be recorded goes first
                self.compact()
        with _appending, self._writable():
            file = self._open()
            written = os.write(file, data)
            if written != len(data):  # the disk is full: leave the torn line behind, in a segment of its own
                os.close(_open_segments.pop((os.getpid(), self.folder.absolute())))
                raise MetapeftError(f"cannot record the trial in {self.folder}: the disk is full")
            os.fsync(file)

    def _open(self) -> int:
        key = (os.getpid(), self.folder.absolute())
        if key in _open_segments and os.fstat(_open_segments[key]).st_nlink:
            return _open_segments[key]
        folder = self.folder / "segments"
        folder.mkdir(parents=True, exist_ok=True)
        host = re.sub(r"[^A-Za-z0-9]+", "-", platform.node()) or "host"
        while True:
            path = folder / f"{host}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(file, fcntl.LOCK_EX)  # until this process ends: a segment in use is not compacted
            if os.fstat(file).st_nlink:  # else a compaction found it empty, between those two lines
                break
            os.close(file)
        _sync_folder(folder)
        _open_segments[key] = file
        return file

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write in {self.folder} ({error.strerror}); set METAPEFT_HOME to a folder you may write in"
            ) from error


def migrate(record: Record) -> Record:
    """A record in today's schema. Raises UserError when it comes from a newer metapeft."""
    version = record.get("schema", SCHEMA)
    if version > SCHEMA:
        raise UserError(
            f"this experience has schema {version} and this metapeft reads up to {SCHEMA}; upgrade metapeft"
        )
    for old in range(version, SCHEMA):
        record = MIGRATIONS[old](record)
    return {**record, "schema": SCHEMA}


def _record(trial: Trial) -> Record:
    return {"schema": SCHEMA, **finite(trial.to_json())}


def _trial(record: Record) -> Trial:
    values = {name: record[name] for name in _FIELDS if name in record}
    for name in _SCORES:
        if values.get(name) is not None:
            values[name] = {k: math.nan if v is None else v for k, v in values[name].items()}
    return Trial.from_json(values)


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _rank(record: Record, layer: int = 0) -> tuple[bool, bool, int, str, str]:
    """Which of two records of one trial counts: the higher. A total order: merging in any order ends the same.

    What was finished and tested is not hidden by a later start that was stopped, failed, or had no test split.
    """
    tested = (record["score"] or {}).get("value") is not None
    return record["status"] == "ok", tested, layer, record["started"], json.dumps(record, sort_keys=True)


def _unique(layers: list[tuple[int, list[Record]]]) -> list[Record]:
    best: dict[str, tuple[int, Record]] = {}
    for layer, records in layers:
        for record in records:
            known = best.get(record["id"])
            if known is None or _rank(known[1], known[0]) < _rank(record, layer):
                best[record["id"]] = (layer, record)
    return sorted((record for _, record in best.values()), key=lambda record: (record["started"], record["id"]))


def _load(path: Path, refuse: bool = False) -> list[Record]:
    """The trials of a file; what is none is refused, or passed over with a warning."""
    return _load_table(path, refuse) if path.suffix == ".parquet" else _load_lines(path, refuse)


def _load_lines(path: Path, refuse: bool) -> list[Record]:
    try:
        lines = path.read_bytes().split(b"\n")
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path} ({error.strerror}); move it away or restore it from a copy") from error
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            if refuse or number < len(lines):  # the last one in a segment is a write that was cut short
                rows.append((number, None))
    return _kept(rows, f"{path} line", refuse)


def _load_table(path: Path, refuse: bool) -> list[Record]:
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(path).read().to_pylist()
        return _kept(enumerate(_from_rows(rows, path), 1), f"{path} row", refuse)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # pyarrow raises many kinds for broken bytes, and so does what is read of them
        raise UserError(f"{path} is not a Parquet file of trials; remove it or restore it from a copy") from error


def _from_rows(rows: list[dict[str, Any]], path: Path) -> list[Record]:
    known: dict[str, Any] = {}  # most configurations and versions come many times
    for row in rows:
        if "id" not in row or "configuration" not in row:
            raise UserError(f"{path} does not hold trials; give a file that `metapeft experience export` wrote")
        for name in _JSON:
            text = row[name]
            if text not in known:
                known[text] = _parsed(text)
            row[name] = copy.copy(known[text])
        for name, parts in _COLUMNS.items():
            value = row[name]
            row[name] = {"value": value} | {part: row.pop(column, None) for part, column in parts}
            if row[name]["metric"] is None:
                row[name] = None
    return rows


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def _kept(rows: Iterable[tuple[object, Any]], where: str, refuse: bool = False) -> list[Record]:
    """The trials among rows that are called `where` and their number."""
    records, faults = [], []
    for number, row in rows:
        try:
            records.append(_checked(row))
        except ValueError as error:
            faults.append(f"{where} {number} is not a trial: {error}")
            if refuse:
                raise UserError(f"{faults[0]}; correct it or take it out (nothing was imported)") from error
    if faults:
        _warn(faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "") + "; skipped")
    return records


@lru_cache(maxsize=1000)
def _warn(text: str) -> None:
    """Once, however often a process reads the file."""
    _log.warning("%s", text)


def _checked(row: Any) -> Record:
    """A record in today's schema that holds a trial which every later stage can read. Raises ValueError saying what is
    wrong with it, UserError where it comes from a newer metapeft."""
    try:
        record = {**_DEFAULTS, **migrate(row)}
        record["cpu_seconds"] = record["cpu_seconds"] or 0.0  # null in tables written before it was measured
        trial = _trial(record)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("it has not the fields that `metapeft experience export` writes") from error
    holds = {
        **{name: isinstance(record[name], str) for name in _TEXTS},
        **{name: _number(record[name]) and record[name] == int(record[name]) for name in _INTEGERS},
        **{name: _number(record[name]) for name in _FLOATS},
        **{name: _scored(getattr(trial, name)) for name in _SCORES},
        "curve": _curved(record.get("curve")),
        "versions": isinstance(record.get("versions"), dict),
    }
    holds["status"] = trial.status in get_args(Status)
    holds["budget"] = holds["budget"] and (trial.budget > 0 or not trial.curve)
    for name in holds:
        if not holds[name]:
            raise ValueError(f"{name} is {brief(repr(record.get(name)), 80)}")
    configuration = trial.configuration
    if not isinstance(configuration, dict) or configuration.get("method") != trial.method:
        raise ValueError(f"its configuration is not one of {brief(trial.method, 60)}")
    if trial.method in METHODS and (fault := _misconfigured(json.dumps(configuration, sort_keys=True))):
        raise ValueError(fault)
    return record


def _number(value: Any, low: float = 0, high: float = 2**63 - 1) -> bool:
    return type(value) in (int, float) and low <= value <= high  # of NaN both are false


def _scored(score: Score | None) -> bool:
    """All metrics lie between 0 and 1 (macro F1 may round beyond it); the loss may be NaN."""
    return score is None or (
        isinstance(score.metric, str)
        and _number(score.value, high=1 + 1e-6)
        and _number(score.standard_error)
        and _number(score.n)
        and score.n == int(score.n)
        and type(score.loss) in (int, float)
    )


def _curved(curve: Any) -> bool:
    """Points of numbers, null where something was not measured; what was validated has a step."""
    return isinstance(curve, list) and all(
        isinstance(point, dict)
        and all(value is None or type(value) in (int, float) for value in point.values())
        and (point.get("validation_score") is None or _number(point.get("step")))
        for point in curve
    )


@lru_cache(maxsize=10_000)
def _misconfigured(text: str) -> str:
    """What is wrong with a configuration as JSON; "" where nothing is."""
    from metapeft.training.configuration import full

    given = json.loads(text)
    try:
        checked = full(given)
    except UserError as error:
        return str(error)
    # What is taken from a person, such as "0.001" for a number, no later stage would take from here.
    other = [name for name in given if checked[name] != given[name]]
    return f"hyperparameter {other[0]} is {brief(repr(given[other[0]]), 60)}" if other else ""


def _table(records: list[Record]) -> pa.Table:
    import pyarrow as pa

    columns: dict[str, pa.DataType] = {"schema": pa.int64()}
    for name in _FIELDS:
        if name in _SCORES:
            columns[name] = pa.float64()
            for part in _PARTS:
                columns[f"{name}_{part}"] = {"metric": pa.string(), "n": pa.int64()}.get(part, pa.float64())
        else:
            columns[name] = pa.int64() if name in _INTEGERS else pa.float64() if name in _FLOATS else pa.string()
    rows = []
    for record in records:
        row = {name: record.get(name) for name in ("schema", *_FIELDS)}
        for name in _JSON:
            row[name] = json.dumps(row[name], ensure_ascii=False)
        for name in _SCORES:
            score = row[name] or {}
            row[name] = score.get("value")
            row |= {f"{name}_{part}": score.get(part) for part in _PARTS}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items())))


def _write_table(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    with _replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path`, whole and on disk, when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _unused(paths: list[Path]) -> Iterator[list[Path]]:
    """Those of the segments that no process has open, locked meanwhile."""
    held: list[tuple[int, Path]] = []
    try:
        for path in paths:
            try:
                file = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            held.append((file, path))
        yield [path for _, path in held]
    finally:
        for file, _ in held:
            os.close(file)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
