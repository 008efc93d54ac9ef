"""A trial: one configuration trained on one task for one budget and seed. The record every later stage reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "diverged", "out_of_memory", "failed", "stopped"]


@dataclass
class Score:
    """A metric with its standard error, over `n` examples; `loss` is the mean cross-entropy in nats, per token (of
    shots that `adapt` held out: per example)."""

    metric: str
    value: float
    standard_error: float
    n: int
    loss: float


@dataclass
class Trial:
    """The outcome of one trial. Every field is JSON; `curve` holds one dict per evaluation point.

    `curve` rows: {"step", "examples", "seconds", "train_loss", "validation_loss", "validation_score", "gradient_noise"}
    (the validation's may be None where none ran; the noise, in examples, where it is not known: see
    `metapeft.training.noise`). `seconds` is training plus evaluation wall time, `cpu_seconds` the processor's in that
    time (other work on the machine lengthens the former, hardly the latter); `peak_memory_mb` is MLX's peak.
    """

    id: str
    task: str
    task_version: str
    backbone: str
    method: str
    configuration: dict[str, Any]
    seed: int
    budget: int  # optimizer steps
    status: Status
    score: Score | None = None  # on the test split
    validation: Score | None = None
    untuned_score: Score | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    train_seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process, all its threads; 0: not measured
    tokens: int = 0
    peak_memory_mb: float = 0.0
    trained_parameters: int = 0
    adapter_bytes: int = 0
    adapter: str = ""  # folder
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""  # ISO 8601, UTC
    error: str = ""
    train_examples: int = 0
    profile_version: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Trial:
        record = dict(record)
        for key in ("score", "validation", "untuned_score"):
            if record.get(key) is not None:
                record[key] = Score(**record[key])
        return cls(**record)


def trial_id(
    task: str,
    task_version: str,
    backbone: str,
    configuration: dict[str, Any],
    seed: int,
    budget: int,
    train_examples: int,
    start: str = "",
    metric: str = "",
) -> str:
    """16 hex digits that the same work always has, so that a trial that was run before is recognised.

    `start` names the weights it starts from, where they are not the method's own; `metric` is what the best weights
    are chosen by. `backbone` is its identity (`metapeft.backbones.identity`).

    `configuration` must have its defaults written out (`metapeft.training.configuration.full`); 8 and 8.0 are the same,
    and so are a list and a tuple.
    """
    work = [
        task,
        task_version,
        backbone,
        _canonical(configuration),
        seed,
        budget,
        train_examples,
        *([start] if start else []),
        *([f"by {metric}"] if metric == "macro_f1" else []),  # the others are their tasks' usual ones
    ]
    text = json.dumps(work, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    """Equal numbers written equally."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
