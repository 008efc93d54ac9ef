"""Versions of the fitted meta-model in METAPEFT_HOME/meta: every one is kept, one is champion, and that can be undone.

    meta/versions/0001.json    a model with what it was fitted to and how it was judged; written once, never changed
    meta/champion.json         {"champion": 1, "before": [...]}, replaced as a whole

Version 0 is the model that ships with the package, or the beliefs where none ships. Plain JSON of some seventy numbers:
the evidence itself is the experience, which a recommendation always reads as it is now.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from metapeft.errors import UserError
from metapeft.files import clear
from metapeft.meta.evaluate import OURS, Fit, Judged, judge
from metapeft.meta.evidence import Observation
from metapeft.meta.experience import SHIPPED
from metapeft.meta.fitting import LEAST_TASKS, fit, groups, standard_errors
from metapeft.meta.model import Model
from metapeft.meta.unfinished import Remaining
from metapeft.profiling import cache
from metapeft.progress import say
from metapeft.settings import home

TOLERANCE = 1.0  # standard errors by which a challenger may look worse than the champion
SCHEMA = 1
QUIET_SECONDS = 3.0  # of waiting for another training, before a person is told


@dataclass(frozen=True)
class Version:
    """`seen`: ids of the observations it was fitted to. `judged`: how it did on families left out, against the
    champion of its time."""

    number: int
    model: Model
    made: str = ""  # ISO 8601, UTC
    tasks: int = 0
    observations: int = 0
    seen: tuple[str, ...] = ()
    judged: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self), "model": self.model.to_json()}


@dataclass(frozen=True)
class Trained:
    """What `train` did: the new version (the champion's, where there was nothing new), whether it became champion, and
    why."""

    version: int
    promoted: bool
    reason: str
    tasks: int
    observations: int
    challenger: dict[str, float]
    champion: dict[str, float]
    model: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def champion() -> Version:
    """The version in force. A version that cannot be read gives way to the one before it."""
    now, before = _succession()
    for number in [now, *reversed(before)]:
        found = _read(_path(number)) if number > 0 else None
        if found is not None:
            return found
    return shipped()


def numbered(number: int) -> Version:
    """A version by its number; the champion, where there is none that can be read."""
    found = shipped() if number == 0 else _read(_path(number))
    return found or champion()


def shipped() -> Version:
    """Version 0."""
    found = _read(SHIPPED / "model.json")
    return Version(0, Model()) if found is None else replace(found, number=0)


def versions() -> list[Version]:
    """All, the oldest first."""
    found = [_read(path) for path in sorted((_folder() / "versions").glob("*.json"))]
    return [shipped(), *(v for v in found if v is not None)]


def train(observations: Sequence[Observation], remaining: Remaining | None = None) -> Trained:
    """Fit a new version, judge it beside the champion on families left out, promote it unless it is worse. Where that
    is the champion once more, there is none: going back from it would change nothing.

    Both are judged as what fitting makes of the observations they were fitted to, without the family in question: a
    champion that has seen the tasks it is judged on would look better than it is. What both predict from are all
    observations of the other families. remaining: what curves that broke off leave open, as the observations count it
    (None: as the champion has it). Two at once take turns, the later is judged beside what the earlier left. Raises
    UserError when there are too few tasks.
    """
    from filelock import FileLock, Timeout

    turn = FileLock(_folder() / "train.lock")
    with _writing(_folder()):
        try:
            turn.acquire(timeout=QUIET_SECONDS)
        except Timeout:
            say("waiting for another training of the meta-model")
            turn.acquire()
    try:
        return _train(observations, remaining)
    finally:
        turn.release()


def _train(observations: Sequence[Observation], remaining: Remaining | None) -> Trained:
    known = {group[0].task.name for group in groups(observations)}
    if len(known) < LEAST_TASKS:
        raise UserError(
            f"the experience has {len(known)} tasks with 3 configurations or more, fitting needs {LEAST_TASKS}; "
            "run `metapeft experience grow`, or import an experience"
        )
    before = champion()
    model = replace(fit(observations), remaining=remaining or before.model.remaining)
    seen = tuple(sorted(o.id for o in observations))
    if before.seen == seen and before.model == model:
        return Trained(
            version=before.number,
            promoted=False,
            reason=f"nothing new; version {before.number} stays champion",
            tasks=len(known),
            observations=len(observations),
            challenger={},
            champion={},
            model=model.to_json(),
        )
    ours = judge(observations, rival=())
    theirs = judge(observations, _again(before), rival=())
    worse, why = compared(ours, theirs)
    judged: dict[str, Any] = {
        "challenger": _means(ours),
        "champion": _means(theirs),
        "against": before.number,
        "verdict": why,
    }
    made = datetime.now(UTC).isoformat(timespec="seconds")
    new = _add(Version(0, model, made, len(known), len(observations), seen, judged))
    if not worse:
        promote(new.number)
    return Trained(
        version=new.number,
        promoted=not worse,
        reason=why,
        tasks=len(known),
        observations=len(observations),
        challenger=judged["challenger"],
        champion=judged["champion"],
        model=model.to_json(),
    )


def _again(version: Version) -> Fit:
    """How a version was fitted, to what it was fitted to; one that was fitted to nothing is what it is."""
    seen = set(version.seen)
    if not seen:
        return lambda known: version.model
    return lambda known: fit([o for o in known if o.id in seen])


def compared(challenger: Sequence[Judged], champion: Sequence[Judged]) -> tuple[bool, str]:
    """Whether the challenger is worse, by regret or by CRPS, and a sentence. The same groups, in the same order."""
    for name, values in (
        ("regret", [(a.regret[OURS], b.regret[OURS]) for a, b in zip(challenger, champion, strict=True)]),
        ("CRPS", [(np.mean(a.crps), np.mean(b.crps)) for a, b in zip(challenger, champion, strict=True)]),
    ):
        if len(values) < 2:
            continue
        difference = np.array([a - b for a, b in values], dtype=float)
        families = [j.family for j in champion]
        few = len(set(families)) / max(1, len(set(families)) - 1)  # of few families the scatter looks too small
        error = math.sqrt(few) * float(standard_errors(difference[None], families)[0])
        if difference.mean() > TOLERANCE * error + 1e-12:
            return True, f"{name} is worse by {difference.mean():.4f} ± {error:.4f} on tasks left out"
    return False, "no worse than the champion on tasks left out"


def promote(number: int) -> Version:
    """Make a version champion (0: the shipped one). Raises UserError when there is no such version."""
    found = shipped() if number == 0 else _read(_path(number))
    if found is None:
        raise UserError(f"there is no readable version {number} of the meta-model; `metapeft meta versions` lists them")
    with _succeeding() as temporary:
        now, before = _succession()
        _crown(temporary, number, [*before, now] if now != number else before)
    return found


def rollback() -> Version:
    """Give the champion's place back to the version before. Raises UserError when there was none."""
    with _succeeding() as temporary:
        _, before = _succession()
        if not before:
            raise UserError("there is no earlier version of the meta-model to go back to")
        found = shipped() if before[-1] == 0 else _read(_path(before[-1]))
        if found is None:
            raise UserError(f"version {before[-1]} of the meta-model cannot be read; promote another one")
        _crown(temporary, before[-1], before[:-1])
    return found


def _means(judged: Sequence[Judged]) -> dict[str, float]:
    if not judged:
        return {}
    inside = float(np.mean([np.mean(j.inside["0.9"]) for j in judged]))
    return {
        "regret": float(np.mean([j.regret[OURS] for j in judged])),
        "crps": float(np.mean([np.mean(j.crps) for j in judged])),
        "spearman": float(np.mean([j.spearman.get(OURS, 0.0) for j in judged])),
        "coverage_90": inside,
        "groups": float(len(judged)),
    }


def _add(version: Version) -> Version:
    """Under the next free number, whole or not at all, whoever else adds one at the same time."""
    folder = _folder() / "versions"
    with _writing(folder) as temporary:
        while True:
            number = 1 + max((int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit()), default=0)
            new = replace(version, number=number)
            _put(temporary, new.to_json())
            try:
                os.link(temporary, _path(number))  # unlike a rename it never takes another's place
                return new
            except FileExistsError:
                continue


@contextlib.contextmanager
def _succeeding() -> Iterator[Path]:
    """Nobody else changes the succession meanwhile: of two promotions at once, one would be missing in it."""
    from filelock import FileLock

    with _writing(_folder()) as temporary, FileLock(_folder() / "champion.lock"):
        yield temporary


def _crown(temporary: Path, number: int, before: list[int]) -> None:
    path = _folder() / "champion.json"
    _put(temporary, {"champion": number, "before": before})
    clear(path)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming is on disk too
    finally:
        os.close(folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """A temporary file in a folder that may be new. Raises UserError when nothing can be written there."""
    temporary = folder / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise UserError(
            f"cannot write in {folder} ({error.strerror}); set METAPEFT_HOME to a folder you may write in"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _put(path: Path, record: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Version | None:
    record = cache.read(path)
    try:
        if record is None or record["schema"] != SCHEMA:
            return None
        values = {name: record[name] for name in ("number", "made", "tasks", "observations", "judged")}
        return Version(**{**values, "seen": tuple(record["seen"]), "model": Model.from_json(record["model"])})
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _succession() -> tuple[int, list[int]]:
    """The champion's number (0: the shipped one) and those that were champion before it, the latest last."""
    record = cache.read(_folder() / "champion.json") or {}
    now, before = record.get("champion"), record.get("before")
    earlier = [n for n in before if isinstance(n, int)] if isinstance(before, list) else []
    return (now if isinstance(now, int) else 0), earlier


def _folder() -> Path:
    return home() / "meta"


def _path(number: int) -> Path:
    return _folder() / "versions" / f"{number:04d}.json"
