"""Small real tasks for tests that run the pipeline."""

from __future__ import annotations

import json
import random
from pathlib import Path

SPAM = ("win cash now", "free prize inside", "claim your reward", "urgent: call to win", "cheap loans today")
HAM = ("see you at lunch", "call me later", "thanks for dinner", "the train is late", "happy birthday")


def spam_rows(count: int = 80, seed: int = 0) -> list[dict[str, str]]:
    """Distinct short messages, half of them spam."""
    random_ = random.Random(seed)
    rows = []
    for number in range(count):
        label = "spam" if number % 2 else "ham"
        phrase = random_.choice(SPAM if number % 2 else HAM)
        rows.append({"text": f"{phrase}, {random_.choice(['Ann', 'Bob', 'Eve', 'Joe'])} {number}", "label": label})
    return rows


def spam_file(folder: Path, count: int = 80) -> Path:
    """The rows as a .jsonl file."""
    path = folder / "spam.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in spam_rows(count)), encoding="utf-8")
    return path
