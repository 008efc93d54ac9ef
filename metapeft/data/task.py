"""A task: labelled text with splits, a format and a metric."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Metric = Literal["accuracy", "macro_f1", "exact_match"]
Kind = Literal["classification", "generation"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One labelled row: the prompt exactly as the backbone reads it, and the completion it must produce.

    `prompt` is plain text, or chat messages (dicts with `role` and `content`) to be rendered by the backbone's chat
    template. `completion` never includes the end-of-sequence token; encoding adds it.
    """

    prompt: str | tuple[tuple[str, str], ...]
    completion: str


@dataclass(frozen=True)
class Task:
    """A dataset with its splits and metric, identified by name and content version.

    `version` is the first 16 hex digits of the sha256 of the canonical rows (prompt and completion, in split order), so
    the same rows have the same version wherever they came from. `dvc_id` is DVC's content id of the file, when there is one.
    """

    name: str
    version: str
    kind: Kind
    metric: Metric
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] = ()  # classification only; sorted
    source: str = ""
    licence: str = ""
    family: str = ""
    dvc_id: str = ""
    notes: tuple[str, ...] = field(default=())  # what loading had to do, for people: rows dropped, truncated, …

    def split(self, name: str) -> tuple[Example, ...]:
        return getattr(self, name)
