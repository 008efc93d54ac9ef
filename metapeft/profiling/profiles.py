"""A task's profile: what it measures like, as named features and as one vector, for one backbone.

Three groups: size (rows, tokens), complexity (labels, what the untuned backbone and a linear probe make of it,
duplicates, noise) and domain (frozen features, characters, language hints). Deterministic, linear in the rows, with
samples of fixed size; kept in METAPEFT_HOME/profiles by the content of the data and of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.profiling import cache, speed, text
from metapeft.profiling.shapes import Shapes, shapes
from metapeft.settings import home

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

SHIPPED = Path(__file__).parent / "shipped"  # profiles of the tasks of the shipped experience
VERSION = "1"  # a change of what is measured, or how, needs a new one


@dataclass(frozen=True)
class Profile:
    """`embedding` holds the features called `names`, in that order, each put on a scale of about one."""

    version: str
    task: str
    task_version: str
    backbone: str
    backbone_content: str
    features: dict[str, float]
    names: tuple[str, ...]
    embedding: tuple[float, ...]
    shapes: Shapes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Profile:
        values = {**record, "shapes": Shapes.from_json(record["shapes"])}
        return cls(**{**values, "names": tuple(record["names"]), "embedding": tuple(record["embedding"])})


def profile(task: Task, backbone: Backbone) -> Profile:
    """Measured, or read from the cache; sees to it that this machine's speed is known too.

    Raises UserError when the task has no training rows, or when one does not fit into the backbone's context.
    """
    if not task.train:
        raise UserError(f"task {task.name} has no training rows; give some before asking for its profile")
    known = kept(task, backbone.content_id)
    if known is None:
        known = measure(task, backbone)
        keep(known, task)
    speed.of(backbone)
    return replace(known, task=task.name, backbone=backbone.id)


def kept(task: Task, backbone_content: str) -> Profile | None:
    """As it was measured before, if it was: what METAPEFT_HOME holds of this task under its metric."""
    found = _read(_path(task, backbone_content))
    if found is None or (found.task_version, found.backbone_content) != (task.version, backbone_content):
        return None
    return found


def keep(measured: Profile, task: Task) -> None:
    """In METAPEFT_HOME. Raises UserError when that cannot be written."""
    cache.write(_path(task, measured.backbone_content), measured.to_json())


def _path(task: Task, backbone_content: str) -> Path:
    return home() / "profiles" / f"{task.version}-{task.metric}-{backbone_content}-{VERSION}.json"


def measure(task: Task, backbone: Backbone) -> Profile:
    """The same, always computed."""
    from metapeft.profiling.probe import features, probe
    from metapeft.training.encode import encode

    rows = [task.train[i] for i in text.sample(task.train, text.SAMPLE)]
    encoded = [encode(row, backbone.tokenizer) for row in rows]
    bodies = text.bodies(rows)
    tokens = sum(e.start for e in encoded) * sum(map(len, bodies)) / max(1, sum(len(text.text(row)) for row in rows))
    measured = text.size(task, encoded) | text.complexity(task) | text.domain(bodies, round(tokens))
    measured |= features(probe(task, backbone))
    return Profile(
        version=VERSION,
        task=task.name,
        task_version=task.version,
        backbone=backbone.id,
        backbone_content=backbone.content_id,
        features={name: float(value) for name, value in measured.items()},
        names=tuple(SCALES),
        embedding=embed(measured),
        shapes=shapes(backbone.model),
    )


def every_profile() -> dict[tuple[str, str], Profile]:
    """All profiles of this version that are known, by (task version, backbone): those that ship with the experience,
    and on top of them those in METAPEFT_HOME. A file that bears the name of another task is passed over."""
    return shipped_profiles() | _profiles((home() / "profiles").glob(f"*-{VERSION}.json"))


def shipped_profiles() -> dict[tuple[str, str], Profile]:
    return _profiles(SHIPPED.glob("*.json"))


def _profiles(paths: Iterable[Path]) -> dict[tuple[str, str], Profile]:
    found: dict[tuple[str, str], Profile] = {}
    for path in sorted(
        paths, key=lambda path: ("-macro_f1-" not in path.name, path.name)
    ):  # the usual metric comes last
        profile = _remembered(path, path.stat().st_mtime_ns)
        if profile is not None and profile.version == VERSION and path.name.startswith(f"{profile.task_version}-"):
            found[profile.task_version, profile.backbone] = profile
    return found


@lru_cache(maxsize=4096)
def _remembered(path: Path, changed: int) -> Profile | None:
    return _read(path)


def embed(features: dict[str, float]) -> tuple[float, ...]:
    """Fixed scales, not statistics of known tasks, so that a vector never changes when another task becomes known."""
    return tuple((change(features[name]) - centre) / scale for name, (change, centre, scale) in SCALES.items())


def _same(value: float) -> float:
    return value


def _log(value: float) -> float:
    return math.log10(1 + value)


# Feature -> how it is changed, its usual middle and its usual spread.
SCALES: dict[str, tuple[Callable[[float], float], float, float]] = {
    "train_examples": (_log, 3.0, 1.0),
    "prompt_tokens_mean": (_log, 1.8, 0.5),
    "prompt_tokens_p90": (_log, 2.0, 0.5),
    "completion_tokens_mean": (_log, 0.6, 0.4),
    "completion_tokens_p90": (_log, 0.7, 0.4),
    "type_token_ratio": (_same, 0.2, 0.1),
    "classification": (_same, 0.5, 0.5),
    "labels": (_log, 0.6, 0.4),
    "label_entropy": (_same, 0.7, 0.3),
    "majority_share": (_same, 0.4, 0.3),
    "distinct_completions": (_same, 0.3, 0.4),
    "near_duplicates": (_same, 0.1, 0.1),
    "disagreeing_duplicates": (_same, 0.0, 0.05),
    "zero_shot_loss": (_log, 0.4, 0.2),
    "zero_shot_score": (_same, 0.4, 0.3),
    "zero_shot_exact": (_same, 0.1, 0.2),
    "probe_accuracy": (_same, 0.5, 0.3),
    "neighbour_disagreement": (_same, 0.3, 0.3),
    "upper": (_same, 0.05, 0.05),
    "digits": (_same, 0.03, 0.05),
    "punctuation": (_same, 0.05, 0.05),
    "non_ascii": (_same, 0.0, 0.2),
    "script_latin": (_same, 0.9, 0.3),
    "words_english": (_same, 0.15, 0.08),
    "words_european": (_same, 0.02, 0.05),
    "word_length": (_same, 4.5, 1.0),
    "tokens_per_character": (_same, 0.25, 0.1),
    **{f"domain_{i:02d}": (_same, 0.0, 0.25) for i in range(16)},
}


def _read(path: Path) -> Profile | None:
    record = cache.read(path)
    try:
        return None if record is None else Profile.from_json(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
