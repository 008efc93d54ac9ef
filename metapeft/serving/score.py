"""Choosing among given answers: the likelihood of each, up to the token that tells it from all others.

The same rule as `metapeft.training.evaluation`, for rows of different adapters and answers in one pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metapeft.errors import UserError
from metapeft.serving.generate import Batched, Pieces, Row
from metapeft.serving.mixed import Resident

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
        """Raises UserError when one is the beginning of another, or the same."""
        having = Counter(s[:d] for s in sequences for d in range(1, len(s) + 1))
        decided = []
        for n, s in enumerate(sequences):
            end = next((d for d in range(1, len(s) + 1) if having[s[:d]] == 1), None)
            if end is None:
                raise UserError(f"labels: number {n + 1} cannot be told from another by its tokens; change one of them")
            decided.append(end)
        nodes = {s[:d] for s, end in zip(sequences, decided, strict=True) for d in range(1, end)}
        paths = sorted(nodes - {node[:-1] for node in nodes})
        return cls(tuple(sequences), tuple(decided), tuple(paths))

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(map(len, self.paths), default=0)


@dataclass(frozen=True)
class Question:
    """A prompt and its answers, asked of an adapter (None: the backbone)."""

    prompt: list[int]
    answers: Answers
    resident: Resident | None

    @property
    def row(self) -> Row:
        """The prompt as a row of a batch, with room for the longest path."""
        return Row(self.prompt, self.resident, self.answers.longest)


def score(batch: Batched, questions: Sequence[Question], piece: int = 256) -> Pieces[list[np.ndarray]]:
    """Log-likelihood of every answer of every question. batch: their rows, in order. piece: tokens read at once."""
    logs = _log_softmax((yield from batch.read_all(max(1, piece // len(questions)))))
    result = [logs[i, [s[0] for s in q.answers.sequences]] for i, q in enumerate(questions)]
    pairs = [(i, path) for i, q in enumerate(questions) for path in q.answers.paths]
    if not pairs:
        return result
    # What the tokens after the first say: every shared beginning is read once, behind its question's prompt.
    peeked = yield from batch.peek([i for i, _ in pairs], [path for _, path in pairs])
    deeper = [_log_softmax(logits) for logits in peeked]
    for i, question in enumerate(questions):
        for n, (sequence, end) in enumerate(zip(question.answers.sequences, question.answers.decided, strict=True)):
            if end == 1:
                continue
            row = next(r for r, (o, path) in enumerate(pairs) if o == i and path[: end - 1] == sequence[: end - 1])
            result[i][n] += sum(deeper[row][d - 1, sequence[d]] for d in range(1, end))
    return result


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (…, vocabulary) -> float64"""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted.astype(np.float64) - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64))
