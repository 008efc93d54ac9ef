"""How well an adapter answers examples, one number per example: what strategies are compared by.

`right` is the probability of the right answer: of the label among all labels, or of every token of a completion. On a
handful of shots it says more than whether the answer was right (0 or 1), and unlike a log-likelihood it lies on the
scale of the score, so that no single example outweighs all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metapeft.peft.base import Adapter
from metapeft.training.evaluation import predict
from metapeft.training.session import Session

LOST = 30.0  # loss, in nats, of an answer by weights that diverged


@dataclass(frozen=True)
class Answers:
    """Per example, (examples,): `hit` 0 or 1, `right` in [0, 1], `loss` its negative logarithm in nats."""

    hit: np.ndarray
    right: np.ndarray
    loss: np.ndarray


def answers(session: Session, adapter: Adapter | None, split: str, indices: Sequence[int] | None = None) -> Answers:
    """Of the examples at `indices` (all by default). The adapter must be attached; what one that diverged cannot answer
    is lost."""
    found = predict(session, adapter, split, indices)
    task = session.task
    if found.label_scores is None:
        loss, hit = found.loss_sum, found.exact
    else:
        examples = task.split(split) if indices is None else [task.split(split)[i] for i in indices]
        truth = np.array([task.labels.index(e.completion.strip()) for e in examples])
        scores = found.label_scores - found.label_scores.max(axis=1, keepdims=True)
        every = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        loss, hit = -every[np.arange(len(truth)), truth], every.argmax(axis=1) == truth
    answered = np.isfinite(loss)
    loss = np.where(answered, loss, LOST)
    return Answers((hit & answered).astype(float), np.exp(-loss) * answered, loss)
