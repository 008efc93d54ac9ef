"""Choosing among given answers: the likelihood of each, up to the token that tells it from all others.

The same rule as `metapeft.training.evaluation`, for rows of different adapters and answers in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metapeft.backbones.forward import run
from metapeft.runtime import mx, nn
from metapeft.serving.generate import Batch, Row
from metapeft.serving.mixed import Mixture, Resident

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Answers:
    """Answers as tokens; each ends with the end of sequence, so that none is the beginning of another.

    `decided`: how many tokens of each must be read; `paths`: the beginnings that several share, longest only.
    """

    sequences: tuple[Tokens, ...]
    decided: tuple[int, ...]
    paths: tuple[Tokens, ...]

    @classmethod
    def of(cls, sequences: Sequence[Tokens]) -> Answers:
        decided = [
            next(d for d in range(1, len(s) + 1) if sum(o[:d] == s[:d] for o in sequences) == 1) for s in sequences
        ]
        nodes = {s[:d] for s, end in zip(sequences, decided, strict=True) for d in range(1, end)}
        paths = sorted(n for n in nodes if not any(o != n and o[: len(n)] == n for o in nodes))
        return cls(tuple(sequences), tuple(decided), tuple(paths))


@dataclass(frozen=True)
class Question:
    """A prompt and its answers, asked of an adapter (None: the backbone)."""

    prompt: list[int]
    answers: Answers
    resident: Resident | None


def score(model: nn.Module, mixture: Mixture, questions: Sequence[Question], piece: int = 256) -> list[np.ndarray]:
    """Log-likelihood of every answer of every question. piece: prompt tokens read at once."""
    batch = Batch(model, mixture, [Row(q.prompt, q.resident, 0) for q in questions])
    width = max(1, piece // len(questions))
    while (logits := batch.advance(width)) is None:
        pass
    logits = logits.astype(mx.float32)
    totals = mx.logsumexp(logits, axis=-1)
    result = []
    for i, question in enumerate(questions):
        roots = mx.array([s[0] for s in question.answers.sequences])
        result.append(np.array(logits[i][roots] - totals[i], dtype=np.float64))
    pairs = [(i, path) for i, q in enumerate(questions) for path in q.answers.paths]
    if pairs:
        _add_deeper(batch, questions, pairs, result)
    return result


def _add_deeper(
    batch: Batch, questions: Sequence[Question], pairs: Sequence[tuple[int, Tokens]], result: list[np.ndarray]
) -> None:
    """Adds what the tokens after the first say: every shared beginning is read once, behind its question's prompt."""
    owners = [i for i, _ in pairs]
    for cache in batch.cache:
        cache.filter(mx.array(owners))
    longest = max(len(path) for _, path in pairs)
    ids = mx.array([[*path, *[0] * (longest - len(path))] for _, path in pairs])
    with batch.mixture.rows([questions[i].resident for i in owners]):
        logits = run(batch.model, ids, cache=batch.cache).astype(mx.float32)
    logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for i, question in enumerate(questions):
        for n, (sequence, end) in enumerate(zip(question.answers.sequences, question.answers.decided, strict=True)):
            if end == 1:
                continue
            row = next(r for r, (o, path) in enumerate(pairs) if o == i and path[: end - 1] == sequence[: end - 1])
            result[i][n] += sum(float(logs[row, d - 1, sequence[d]]) for d in range(1, end))
