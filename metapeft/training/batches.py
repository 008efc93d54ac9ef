"""Batches: which examples train at which step, in groups of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BUCKET = 16  # batches sorted by length together: enough to remove most padding, few enough to keep the order random


def batch_at(lengths: Sequence[int], batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of one step. Depends on its arguments alone, so a resumed run sees the same data."""
    per_epoch = max(1, len(lengths) // batch_size) if len(lengths) > batch_size else 1
    epoch, position = divmod(step, per_epoch)
    return _epoch(tuple(lengths), batch_size, seed, epoch)[position]


@lru_cache(maxsize=8)
def _epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    if len(order) <= batch_size:
        return [order.tolist()]
    order = order[: len(order) // batch_size * batch_size]
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * BUCKET):
        bucket = sorted(order[start : start + batch_size * BUCKET].tolist(), key=lambda i: lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def shards(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Cuts a batch into at most `count` parts of similar padded size; positions in `lengths`, shortest first.

    Parts run at the same time on CPU streams: the slowest one decides, so the largest padded part is made smallest.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    count = min(count, len(order))
    if count == 1:
        return [order]
    if count > 2:
        half = count // 2
        left, right = _halves(order, lengths)
        return [
            [part[i] for i in piece]
            for part, n in ((left, half), (right, count - half))
            for piece in shards([lengths[i] for i in part], n)
        ]
    return list(_halves(order, lengths))


def _halves(order: list[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    longest = lengths[order[-1]]
    cost = [max(cut * lengths[order[cut - 1]], (len(order) - cut) * longest) for cut in range(1, len(order))]
    cut = 1 + int(np.argmin(cost))
    return order[:cut], order[cut:]
