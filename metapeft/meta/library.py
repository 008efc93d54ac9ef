"""The adapter library: the best adapter of every method on every task that was trained on here, to start others from.

    library/BACKBONE-CONTENT/TASK-VERSION/METHOD/    a sealed adapter folder, replaced as a whole
    library/.locks/                                  one file per place, locked while somebody compares and replaces

An adapter is chosen by its score on the validation split, less SIZE for every doubling of its size: on some 64 examples
most differences are noise, and a library is read often. Weights are kept as float16, half the bytes: rounding them
changes each by at most 1/2048 of itself (a tensor with numbers that float16 does not have stays as it is). The folder's
metapeft.json says under "library" where the task came from, under which licence, and the task's measured features, so
that the learned metric of the meta-model finds the nearest tasks, whatever else is still known of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.profiling import Profile
from metapeft.settings import home
from metapeft.training.trial import Score, Trial

if TYPE_CHECKING:
    from metapeft.meta.evidence import Known
    from metapeft.meta.model import Model
    from metapeft.peft.saved import Saved

SIZE = 0.005  # score that a doubling of the adapter's size must bring
SMALL = 1e6  # bytes from which on size counts
LARGEST = 24e6  # bytes of an adapter that is kept at all
HALF = 65504.0  # the largest float16
SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """One adapter of the library. `trial` is its record (with validation, test and untuned scores), `features` the
    task's profile. `bytes`: of its weights."""

    folder: Path
    trial: Trial
    family: str
    source: str
    licence: str
    kind: str
    labels: tuple[str, ...]
    backbone_content: str
    profile_version: str
    features: dict[str, float]
    bytes: int

    @property
    def worth(self) -> tuple[float, float]:
        """What adapters of one task and method are compared by."""
        return worth(self.trial, self.bytes)

    @property
    def gain(self) -> float:
        """Score above the untuned backbone's on the test split; NaN where either was not measured."""
        scores = self.trial.score, self.trial.untuned_score
        return math.nan if scores[0] is None or scores[1] is None else scores[0].value - scores[1].value

    def known(self) -> Known:
        """Its task as the metric sees it."""
        from metapeft.meta.evidence import Known

        trial = self.trial
        return Known(
            trial.task_version, trial.backbone, trial.task, self.family, trial.train_examples, dict(self.features)
        )

    def read(self) -> Saved:
        """The adapter itself, checked against its manifest. Raises UserError when it was damaged."""
        from metapeft.peft import checkpoints

        return checkpoints.read(self.folder)

    def to_json(self) -> dict[str, Any]:
        """For people and machines: no features, no learning curve."""
        trial = self.trial
        scores = {name: None if s is None else asdict(s) for name, s in _scores(trial).items()}
        return {
            "task": trial.task,
            "task_version": trial.task_version,
            "method": trial.method,
            "backbone": trial.backbone,
            **scores,
            "configuration": trial.configuration,
            "steps": trial.budget,
            "train_examples": trial.train_examples,
            "trial": trial.id,
            "family": self.family,
            "source": self.source,
            "licence": self.licence,
            "bytes": self.bytes,
            "profile_version": self.profile_version,
            "folder": str(self.folder),
        }


@dataclass(frozen=True)
class Found:
    """An adapter of a task near another. similarity: 1 fares like it with every configuration, 0 says nothing."""

    entry: Entry
    similarity: float


def folder() -> Path:
    return home() / "library"


def offer(adapter: Path, trial: Trial, task: Task, profile: Profile) -> bool:
    """Takes over the adapter in the folder `adapter` when it is the best known of its task and method, or the first by
    another metric than the known one's; whether it was.

    Only finished trials count, with a validation score and at most LARGEST bytes. May be called by several processes at
    once, and killed: the best of what was offered stays, whole. Raises UserError when the adapter's folder is damaged
    or holds another method's adapter, or when METAPEFT_HOME cannot be written.
    """
    from filelock import FileLock

    from metapeft.meta.evidence import metric
    from metapeft.peft import checkpoints

    if trial.status != "ok" or trial.validation is None or not math.isfinite(trial.validation.value):
        return False
    saved = checkpoints.read(adapter)
    if saved.config.method != trial.method:
        held = saved.config.method
        raise UserError(f"{adapter} holds {held}, but the trial is of {trial.method}; offer the folder it wrote")
    tensors = {name: _half(value) for name, value in saved.tensors.items()}
    size = sum(value.nbytes for value in tensors.values())
    if size > LARGEST:
        return False
    record = replace(trial, adapter="", profile_version=profile.version).to_json()
    about = {
        "schema": SCHEMA,
        "family": task.family or task.name,
        "source": task.source,
        "licence": task.licence,
        "kind": task.kind,
        "labels": list(task.labels),
        "backbone_content": profile.backbone_content,
        "profile_version": profile.version,
        "features": profile.features,
        "bytes": size,
    }
    place = _place(trial, profile.backbone_content)
    locks = folder() / ".locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = hashlib.sha256(str(place.relative_to(folder())).encode()).hexdigest()[:16]
        with FileLock(locks / f"{lock}.lock"):
            before = _read(place)
            comparable = before is not None and metric(before.trial) == metric(trial)
            if before is not None and comparable and before.worth >= worth(trial, size):
                return False
            kept = replace(saved, tensors=tensors, metadata=saved.metadata | {"trial": record, "library": about})
            checkpoints.write(place, kept)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"cannot write {place} ({reason}); set METAPEFT_HOME to a folder you may write in") from error
    return True


def worth(trial: Trial, size: int) -> tuple[float, float]:
    """The validation score less what the size costs; among equals the lower loss is better."""
    assert trial.validation is not None
    return round(trial.validation.value - SIZE * math.log2(max(1.0, size / SMALL)), 6), -trial.validation.loss


def entries() -> list[Entry]:
    """All adapters, by backbone, task, version and method. What cannot be read is left out."""
    found = {path.parent for path in folder().glob("*/*/*/metapeft.json")}
    # Between the two renames of a replacement the whole folder is the one that stepped aside.
    places = {p.with_name(p.name[1:].partition(".")[0]) if p.name[0] == "." else p for p in found}
    return [entry for place in sorted(places) if (entry := _read(place)) is not None]


def find(
    profile: Profile,
    count: int = 5,
    *,
    methods: Collection[str] | None = None,
    without: Collection[str] = (),
    named: str = "",
    model: Model | None = None,
) -> list[Found]:
    """The adapters of the tasks that are nearest to the profile's by the learned metric, nearest task first.

    count: tasks at most. methods: None is all. without: names and families of tasks that do not count; neither does the
    task itself. named: a name alone, for a file may be called like a family. model: whose metric; None is the
    champion's. Within a task the best adapter comes first.
    """
    from metapeft.meta import versions
    from metapeft.meta.evidence import Known

    model = model or versions.champion().model
    usable = [
        entry
        for entry in entries()
        if entry.backbone_content == profile.backbone_content
        and entry.profile_version == profile.version
        and entry.trial.task_version != profile.task_version
        and (methods is None or entry.trial.method in methods)
        and entry.trial.task != named
        and not {entry.trial.task, entry.family} & set(without)
    ]
    examples = round(profile.features.get("train_examples", 0))
    here = Known(profile.task_version, profile.backbone, profile.task, "", examples, profile.features)
    tasks: dict[str, list[Entry]] = {}
    for entry in sorted(usable, key=lambda e: e.worth, reverse=True):
        tasks.setdefault(entry.trial.task_version, []).append(entry)
    near = model.metric.similarity([here], [found[0].known() for found in tasks.values()], model.length)
    ranked = sorted(zip(near.reshape(-1), tasks, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [Found(entry, float(similarity)) for similarity, task in ranked[:count] for entry in tasks[task]]


def _scores(trial: Trial) -> dict[str, Score | None]:
    return {"validation": trial.validation, "score": trial.score, "untuned": trial.untuned_score}


def _half(value: Any) -> Any:
    """A tensor in float16, where its numbers are of that size."""
    from metapeft.runtime import mx

    if value.size == 0:  # a layer that AdaLoRA left no rank
        return value
    return value.astype(mx.float16) if float(mx.max(mx.abs(value))) <= HALF else value


def _place(trial: Trial, content: str) -> Path:
    return (
        folder() / f"{_slug(trial.backbone)}-{content[:8]}" / f"{_slug(trial.task)}-{trial.task_version}" / trial.method
    )


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", Path(name).name).strip("-")[:60] or "unnamed"


def _read(place: Path) -> Entry | None:
    """What metapeft.json says; the weights are read, and the seal checked, when they are asked for."""
    from metapeft.peft import folder as folders

    try:
        path = folders.locate(place) / "metapeft.json"
        return replace(entry, folder=place) if (entry := _parsed(path, path.stat().st_mtime_ns)) else None
    except (OSError, UserError):
        return None


@lru_cache(maxsize=4096)
def _parsed(path: Path, changed: int) -> Entry | None:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        about: dict[str, Any] = metadata["library"]
        if about["schema"] != SCHEMA:
            return None
        names: Sequence[str] = (
            "family", "source", "licence", "kind", "backbone_content", "profile_version", "features", "bytes"
        )  # fmt: skip
        trial = Trial.from_json(metadata["trial"])
        return Entry(path.parent, trial, labels=tuple(about["labels"]), **{name: about[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError):
        return None
