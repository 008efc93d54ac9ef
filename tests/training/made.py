"""Small tasks and sessions to train on."""

from __future__ import annotations

import random

from mlx.utils import tree_map

from metapeft.data.task import Example, Task
from metapeft.peft import create, parse
from metapeft.peft.base import METHODS, Adapter
from metapeft.runtime import mx
from metapeft.training.encode import text_ids
from metapeft.training.session import Session
from tests.backbones.tiny import tiny

__all__ = ["METHODS", "classification", "generation", "moved", "session"]

LABELS = ("no", "yes")
# Enough of each method to have every kind of parameter, little enough to be fast.
SMALL = {"lora": {"rank": 2}, "adalora": {"initial_rank": 3, "target_rank": 2}, "p_tuning": {"width": 16}}


def classification(
    train: int = 40, rest: int = 12, labels: tuple[str, ...] = LABELS, longest: int = 20, seed: int = 0
) -> Task:
    """Does the word have more than one "a"? Prompts of very different lengths that begin alike."""
    chance = random.Random(seed)

    def example() -> Example:
        word = "".join(chance.choices("abc", k=chance.randint(1, longest)))
        return Example(f"Many a? {word}:", " " + labels[word.count("a") % len(labels)])

    examples = tuple(example() for _ in range(train + 2 * rest))
    used = {e.completion.strip() for e in examples}
    splits = (examples[:train], examples[train : train + rest], examples[train + rest :])
    return Task("many-a", f"{seed:016d}", "classification", "accuracy", *splits, tuple(sorted(used)))


def generation(train: int = 24, rest: int = 8, seed: int = 0) -> Task:
    """Writes the word backwards; nothing is shared by all prompts."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcd", k=chance.randint(1, 9))) for _ in range(train + 2 * rest)]
    examples = tuple(Example(f"{word} ->", f" {word[::-1]}") for word in words)
    splits = (examples[:train], examples[train : train + rest], examples[train + rest :])
    return Task("backwards", f"{seed:016d}", "generation", "exact_match", *splits)


def session(architecture: str = "llama", task: Task | None = None, quantized: bool = False) -> Session:
    return Session(tiny(architecture, quantized=quantized), task or classification())


def moved(method: str, at: Session, scale: float = 0.05, **values: object) -> Adapter:
    """An attached adapter whose parameters are not at their start, so that every one of them matters."""
    config = parse(method, SMALL.get(method, {}) | values)
    adapter = create(config, at.model, seed=0, text_ids=text_ids(at.shared, at.encoded["train"], 64))
    adapter.attach(at.model)
    mx.random.seed(1)
    values_moved = tree_map(lambda v: v + scale * mx.random.normal(v.shape), adapter.module.trainable_parameters())
    adapter.module.update(values_moved)
    mx.eval(adapter.module.parameters())
    return adapter
