"""What the rows of a task say without any model: sizes, vocabulary, labels, duplicates, characters.

Linear in the rows; what needs a tokenizer or looks at characters is done on a fixed random sample.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from metapeft.data.task import Example, Task

if TYPE_CHECKING:
    from metapeft.training.encode import Encoded

SAMPLE = 1000  # rows that are tokenised and read character by character
CHARACTERS = 2000  # read per row
TOKENS = 10_000  # vocabulary is counted over as many tokens in every task, because it grows with the text

_SCRIPTS = {
    "latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "greek_cyrillic": "\u0370-\u052f",
    "semitic": "\u0590-\u06ff",
    "indic": "\u0900-\u0dff",
    "cjk": "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af",
}
_FUNCTION_WORDS = {
    "english": {"the", "of", "and", "to", "in", "is", "that", "it", "for", "was", "you", "with", "this"},
    "european": {"de", "la", "le", "les", "que", "el", "en", "y", "et", "der", "die", "und", "das", "di", "il", "e"},
}
_WORD = re.compile(r"\w+")


def sample(rows: Sequence[Example], size: int) -> list[int]:
    """Indices of at most `size` rows, always the same ones, in random order."""
    return [int(i) for i in np.random.default_rng(0).permutation(len(rows))[:size]]


def text(example: Example) -> str:
    """The prompt as one text; the messages of a chat one under another."""
    return example.prompt if isinstance(example.prompt, str) else "\n".join(content for _, content in example.prompt)


def bodies(examples: Sequence[Example]) -> list[str]:
    """The prompts without the words that all begin and end with: a template says nothing about a task's domain."""
    texts = [text(example) for example in examples]
    if len(set(texts)) < 2:
        return texts
    begin = _shared(texts)
    rest = [t[begin:] for t in texts]
    end = _shared([t[::-1] for t in rest])
    return [t[: len(t) - end] for t in rest]


def _shared(texts: Sequence[str]) -> int:
    """Length of the whole words that all texts begin with. (The smallest and largest text differ first.)"""
    low, high = min(texts), max(texts)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return max(low[:same].rfind(space) for space in " \n\t") + 1


def size(task: Task, encoded: Sequence[Encoded]) -> dict[str, float]:
    """encoded: the sampled training rows. `shared_tokens` begin every prompt; training runs them once per step."""
    from metapeft.training.encode import shared_beginning

    prompts = np.array([e.start for e in encoded])
    completions = np.array([len(e.ids) - e.start for e in encoded])
    features = {f"{split}_examples": float(len(task.split(split))) for split in ("train", "validation", "test")}
    for name, lengths in (("prompt", prompts), ("completion", completions)):
        features[f"{name}_tokens_mean"] = float(lengths.mean())
        for quantile in (10, 50, 90):
            features[f"{name}_tokens_p{quantile}"] = float(np.percentile(lengths, quantile))
        features[f"{name}_tokens_max"] = float(lengths.max())
    features["train_tokens"] = float((prompts + completions).mean() * len(task.train))
    features["shared_tokens"] = float(len(shared_beginning(encoded)))
    seen = [token for e in encoded for token in e.ids][:TOKENS]
    features["vocabulary"] = float(len(set(seen)))
    features["type_token_ratio"] = len(set(seen)) / len(seen)
    return features


def complexity(task: Task) -> dict[str, float]:
    """Labels and duplicates, over all training rows."""
    counts = Counter(example.completion.strip() for example in task.train)
    shares = np.array(list(counts.values())) / len(task.train)
    labels = len(task.labels)
    exact = Counter((example.prompt, example.completion) for example in task.train)
    normal = [" ".join(_WORD.findall(text(example).lower())) for example in task.train]
    answers: dict[str, Counter[str]] = {}
    for key, example in zip(normal, task.train, strict=True):
        answers.setdefault(key, Counter())[example.completion.strip()] += 1
    repeated = [c for c in answers.values() if c.total() > 1]
    disagreeing = sum(c.total() - max(c.values()) for c in repeated)
    entropy = float(-(shares * np.log2(shares)).sum())
    return {
        "classification": float(task.kind == "classification"),
        "labels": float(labels),
        "label_entropy": entropy / math.log2(labels) if labels > 1 else 0.0,
        "majority_share": float(shares.max()),
        "distinct_completions": len(counts) / len(task.train),
        "duplicates": 1 - len(exact) / len(task.train),
        "near_duplicates": 1 - len(answers) / len(task.train),
        "disagreeing_duplicates": disagreeing / len(task.train),
    }


def domain(texts: Sequence[str], tokens: int) -> dict[str, float]:
    """Shares of characters and words. texts: sampled prompts without their template; tokens: how many they have."""
    whole = "\n".join(t[:CHARACTERS] for t in texts)
    length = max(1, len(whole))
    features = {
        "letters": sum(map(str.isalpha, whole)) / length,
        "upper": sum(map(str.isupper, whole)) / length,
        "digits": sum(map(str.isdigit, whole)) / length,
        "spaces": sum(map(str.isspace, whole)) / length,
        "non_ascii": 1 - len(whole.encode("ascii", "ignore")) / length,
    }
    features["punctuation"] = max(0.0, 1 - features["letters"] - features["digits"] - features["spaces"])
    letters = max(1, sum(map(str.isalpha, whole)))
    for script, ranges in _SCRIPTS.items():
        features[f"script_{script}"] = min(1.0, sum(map(len, re.findall(f"[{ranges}]+", whole))) / letters)
    words = [word.lower() for word in _WORD.findall(whole)]
    for language, known in _FUNCTION_WORDS.items():
        features[f"words_{language}"] = sum(word in known for word in words) / max(1, len(words))
    features["word_length"] = sum(map(len, words)) / max(1, len(words))
    features["tokens_per_character"] = tokens / max(1, sum(map(len, texts)))
    return features
