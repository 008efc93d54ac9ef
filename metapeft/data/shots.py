"""Shots: the few examples that a task is learned from, drawn evenly from its labels, and their folds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from metapeft.data import formats, load, splits, versions
from metapeft.data.task import Example, Kind, Task
from metapeft.data.templates import check_template, default_template, render
from metapeft.errors import UserError
from metapeft.settings import DataSettings

MOST = 1000


def load_shots(task: str, count: int | None, settings: DataSettings, seed: int) -> tuple[Task, list[str]]:
    """A task with `count` shots as its training split, and notes on rows that only the settings' limits left out.

    A file with no more rows than that (None: any file) is learned from whole, with none held out for a test, and one
    with too few rows to be split has no test either. Raises UserError as `load_task` does, and where a task that is no
    file comes without a number.
    """
    path = Path(task).expanduser()
    named = path.is_file() or path.suffix.lower() in formats.SUFFIXES  # one that is missing is told as such
    if named and (count is None or rows(path) <= count or rows(path) < splits.MIN_PROMPTS):
        few = read(path, settings)
        there, notes = len(few.train), list(few.notes)
        if count is not None and count > there:
            notes.append(f"{path.name} has {splits.counted(there, 'different row')}: all are learned from")
        return few if count is None or count >= there else draw(few, count, seed), notes
    if count is None:
        raise UserError(f"say how many examples of {task} to learn from: --shots K")
    whole = load.load_task(task, settings)
    return draw(whole, count, seed), list(whole.notes)


def draw(task: Task, count: int, seed: int) -> Task:
    """The task with `count` of its training examples, as evenly from all labels as they allow; the other splits stay.

    The same seed gives the same shots, and fewer of them are the first of more. Raises UserError when there are fewer
    training examples.
    """
    if not 1 <= count <= len(task.train):
        raise UserError(f"task {task.name} has {len(task.train)} training examples; give --shots from 1 to that")
    order = np.random.default_rng(seed).permutation(len(task.train))
    chosen = balanced([task.train[i] for i in order], bool(task.labels))[:count]
    return renewed(task, chosen)


def renewed(task: Task, train: Sequence[Example]) -> Task:
    """The task with another training split, and so another version."""
    new = replace(task, train=tuple(train))
    return replace(new, version=load.version({name: new.split(name) for name in ("train", "validation", "test")}))


def balanced(examples: Sequence[Example], labelled: bool) -> list[Example]:
    """In an order that takes one of every label in turn (as they come, where there are no labels)."""
    if not labelled:
        return list(examples)
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.completion].append(example)
    longest = max(map(len, groups.values()))
    return [group[turn] for turn in range(longest) for group in groups.values() if turn < len(group)]


def folds(task: Task, count: int) -> list[list[int]]:
    """Which training examples are held out together, `count` times at most, each label spread over all of them. None
    where nothing would be left to learn from."""
    order = sorted(range(len(task.train)), key=lambda i: task.train[i].completion if task.labels else "")
    places = {i: place % count for place, i in enumerate(order)}
    first: dict[str, int] = {}  # of a prompt that comes with several answers: all of them are held out together
    for i, example in enumerate(task.train):
        places[i] = places[first.setdefault(splits.normalised(example.prompt), i)]
    found = [[i for i in range(len(task.train)) if places[i] == fold] for fold in range(count)]
    return [held for held in found if 0 < len(held) < len(task.train)]


def spelled(task: Task) -> tuple[Example, ...]:
    """One example of every label that has one: it tells the scorer how the label is written."""
    first = {e.completion.strip(): e for name in ("test", "validation", "train") for e in task.split(name)}
    return tuple(first[label] for label in task.labels if label in first)


def rows(path: Path) -> int:
    """How many different rows a task file has. Raises UserError as `load_task` does."""
    return len(dict.fromkeys(formats.read_file(path).rows))


def read(path: Path, settings: DataSettings) -> Task:
    """A file all of whose rows are shots, none held out for a test, labels in turn. Rows that differ in case or white
    space alone are one, as when a task is split: held-out shots must not be known. Raises UserError as `load_task`
    does."""
    table = formats.read_file(path)
    if len(set(table.rows)) > MOST:
        raise UserError(f"{path} has {len(set(table.rows)):,} rows; at most {MOST:,} are shots: give fewer by --shots")
    labels = load.check_labels({"train": list(table.rows)}, str(path), few=True) if table.shape == "text+label" else ()
    kind: Kind = "classification" if labels else "generation"
    template = check_template(settings.template or default_template(kind, labels))
    different: dict[tuple[str, str], Example] = {}
    for row in table.rows:
        example = render(row, template, labels)
        different.setdefault((splits.normalised(example.prompt), example.completion), example)
    examples = tuple(balanced(list(different.values()), bool(labels)))
    left_out = len(table.rows) - len(examples)
    return Task(
        name=load.called(path),
        version=load.version({"train": examples, "validation": (), "test": ()}),
        kind=kind,
        metric=load.check_metric(settings.metric, kind),
        train=examples,
        validation=(),
        test=(),
        labels=labels,
        source=str(path),
        dvc_id=versions.content_id(path),
        template=template,
        notes=(f"{left_out} duplicate rows left out",) if left_out else (),
    )
