"""Small tasks to profile."""

from __future__ import annotations

import random
from dataclasses import replace

from metapeft.data.task import Example, Task

HAM = "meet me at the office tomorrow for lunch with the kids later ok see you soon"
SPAM = "win free prize cash call now claim txt urgent reward offer 1000 pounds"


def classification(rows: int = 60, seed: int = 0, labels: tuple[str, ...] = ("ham", "spam")) -> Task:
    """Rows whose words give their label away; half of `rows` are for training."""
    generator = random.Random(seed)
    examples = []
    for index in range(rows):
        label = labels[index % len(labels)]
        words = (SPAM if labels.index(label) % 2 else HAM).split()
        body = " ".join(generator.choices(words, k=generator.randint(3, 12)))
        examples.append(Example(f"Is this spam?\n\nMessage: {body}\nLabel:", f" {label}"))
    half, rest = rows // 2, rows // 4
    splits = (tuple(examples[:half]), tuple(examples[half : half + rest]), tuple(examples[half + rest :]))
    return Task("spam", f"{seed:04d}{rows:012d}", "classification", "accuracy", *splits, tuple(sorted(labels)))


def generation(rows: int = 40) -> Task:
    examples = tuple(Example(f"{n} + {n % 7} =", f" {n + n % 7}") for n in range(rows))
    splits = (examples[: rows // 2], examples[rows // 2 : rows * 3 // 4], examples[rows * 3 // 4 :])
    return Task("sums", "s" * 16, "generation", "exact_match", *splits)


def chat(rows: int = 20) -> Task:
    task = classification(rows)
    turn = [
        tuple(Example((("system", "Be brief."), ("user", str(e.prompt))), e.completion) for e in task.split(s))
        for s in ("train", "validation", "test")
    ]
    return replace(task, version="chat" * 4, train=turn[0], validation=turn[1], test=turn[2])
