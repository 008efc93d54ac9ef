"""Deterministic train, validation and test splits that no duplicate crosses.

A row's place follows from its content and the seed alone, never from its position in the file: the same rows in another
order give the same splits. Rows whose prompts agree up to case and white space stay together.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from metapeft.data.rows import Row
from metapeft.data.task import SPLITS, Prompt
from metapeft.errors import UserError

TEST_SHARE, VALIDATION_SHARE = 0.30, 0.15  # of the distinct prompts; the rest is for training
MIN_PROMPTS = 10
MANY = 10  # rows per label that a cut of a given validation or test split has room for, to begin with one of each label
SPOKEN = {"train": "training", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Limits:
    """Rows per split at most."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Group:
    """Rows with one normalised prompt. `label` is what the group is stratified by ("" for free text)."""

    key: str
    label: str
    rows: tuple[Row, ...]


def make_splits(
    given: Mapping[str, Sequence[Row]], limits: Limits, seed: int, stratified: bool, source: str
) -> tuple[dict[str, list[Row]], list[str]]:
    """Splits of `given` and notes on what was left out.

    `given` maps split names to rows; one entry, "train", means no split was made yet. Splits that are given are kept, a
    missing one is cut from the training rows. Exact duplicates count once; a prompt that stands in several given splits
    stays in the one evaluated last (test, then validation) and leaves the others. The test split does not depend on the
    other limits, and a smaller training split is part of a larger one.

    Raises UserError naming `source` when fewer than MIN_PROMPTS distinct prompts are left to train on and to cut from.
    """
    notes: list[str] = []
    groups: dict[str, list[Group]] = {}
    taken: set[str] = set()
    for name in reversed(SPLITS):
        if name not in given:
            continue
        found = grouped(given[name], seed, stratified)
        duplicates = len(given[name]) - sum(len(group.rows) for group in found)
        if duplicates:
            which = f"{name}: " if len(given) > 1 else ""
            notes.append(f"{which}{counted(duplicates, 'duplicate row')} left out")
        groups[name] = [group for group in found if group.key not in taken]
        leaked = len(found) - len(groups[name])
        if leaked:
            notes.append(f"{name}: {counted(leaked, 'prompt')} left out that other splits hold too")
        taken |= {group.key for group in found}

    pool = interleaved(groups.get("train", []))
    whole = len(pool)
    if whole < MIN_PROMPTS:
        available = counted(whole, "distinct prompt")
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"{source} has only {available} to train on{why}; give at least {MIN_PROMPTS} different rows")
    if "test" not in groups:
        size = max(1, min(limits.test, int(whole * TEST_SHARE)))
        groups["test"], pool = pool[:size], pool[size:]
    if "validation" not in groups:
        size = max(1, min(limits.validation, int(whole * VALIDATION_SHARE)))
        groups["validation"], pool = pool[-size:], pool[:-size]
    groups["train"] = pool

    result = {}
    for name, limit in (("train", limits.train), ("validation", limits.validation), ("test", limits.test)):
        count, labels = sum(len(group.rows) for group in groups[name]), {group.label for group in groups[name]}
        # A row of each label first would be much of a short cut, and what is measured on must be like the whole.
        by_chance = name != "train" and name in given and count > limit and len(labels) * MANY > limit
        rows = [row for group in interleaved(groups[name], None if by_chance else 0.0) for row in group.rows]
        result[name] = rows[:limit]
        if len(rows) > limit:
            notes.append(f"using {limit:,} of {len(rows):,} {SPOKEN[name]} rows (data.max_{name})")
    return result, notes


def grouped(rows: Iterable[Row], seed: int, stratified: bool) -> list[Group]:
    """Rows with the same normalised prompt together, each (prompt, answer) once, in an order of content and seed."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        same = found[normalised(row.prompt)]
        answer = " ".join(row.answer.split())
        kept = same.get(answer)
        # The smallest spelling stands for all, so that the file's order does not matter.
        same[answer] = row if kept is None else min(kept, row, key=lambda r: (canonical(r.prompt), r.answer))
    groups = [
        Group(
            hashlib.sha256(f"{seed}\n{prompt}".encode()).hexdigest(),
            min(same) if stratified else "",
            tuple(same[answer] for answer in sorted(same)),
        )
        for prompt, same in found.items()
    ]
    return sorted(groups, key=lambda group: group.key)


def interleaved(groups: Sequence[Group], offset: float | None = 0.5) -> list[Group]:
    """The groups in an order in which every slice holds about the same share of each label (systematic sampling).

    The i-th of a label's n groups comes at (i + offset) / n. With .5, a label's only group comes in the middle,
    where training rows are cut from; with 0, every label's first group comes first: a short beginning misses no label.
    With None each label has an offset of its own, by chance: a beginning has its labels as often as the whole.
    """
    sizes = Counter(group.label for group in groups)
    offsets: dict[str, float] = {}
    seen: Counter[str] = Counter()
    placed = []
    for group in groups:
        own = offsets.setdefault(group.label, int(group.key[-8:], 16) / 16**8 if offset is None else offset)
        placed.append(((seen[group.label] + own) / sizes[group.label], group.key, group))
        seen[group.label] += 1
    return [group for _, _, group in sorted(placed, key=lambda item: item[:2])]


def normalised(prompt: Prompt) -> str:
    """Case folded, white space collapsed (of each message by itself): what counts as the same prompt."""
    if isinstance(prompt, str):
        return " ".join(prompt.casefold().split())
    return canonical(tuple((role, " ".join(text.casefold().split())) for role, text in prompt))


def canonical(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
