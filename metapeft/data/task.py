"""A task: labelled text with splits, a format and a metric."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Metric = Literal["accuracy", "macro_f1", "exact_match"]
Kind = Literal["classification", "generation"]
Prompt = str | tuple[tuple[str, str], ...]  # plain text, or chat messages as (role, content)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One labelled row: the prompt exactly as the backbone reads it, and the completion it must produce.

    `prompt` is plain text, or chat messages ((role, content) pairs) to be rendered by the backbone's chat template.
    `completion` starts with the space that separates it from the prompt, where there is one; it never includes the
    end-of-sequence token: encoding adds it.
    """

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Task:
    """A dataset with its splits and metric, identified by name and content version.

    `version` is the first 16 hex digits of the sha256 of the canonical rows (prompt and completion, in split order), so
    the same rows have the same version wherever they came from. `dvc_id` is DVC's content id of the file, if there is
    one.
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
    template: str = ""  # how a text becomes a prompt (see `metapeft.data.templates`); chat messages have none
    notes: tuple[str, ...] = field(default=())  # what loading had to do, for people: rows dropped, truncated, …

    def split(self, name: str) -> tuple[Example, ...]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @property
    def label_completions(self) -> tuple[str, ...]:
        """The completion of each label, in the order of `labels`, with the leading space that the examples have."""
        return tuple(separator(self.train[0].prompt) + label for label in self.labels)


def separator(prompt: Prompt) -> str:
    """What stands between a prompt and its completion: a space, unless the prompt ends in one or is a conversation.

    Tokenizers of the GPT-2 kind join a space to the word after it; a completion that starts with its space is what the
    backbone has seen in its training.
    """
    return "" if not isinstance(prompt, str) or not prompt or prompt[-1].isspace() else " "
