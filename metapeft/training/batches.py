"""Batches: which examples train at which step, in groups of similar length."""

from __future__ import annotations

from bisect import bisect_left
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
    """Cuts a batch into `count` parts (or one per example) of similar length; positions in `lengths`, shortest first.

    Parts run at the same time: the slowest one decides, so the largest padded part is made as small as it can be.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    count = min(count, len(order))
    sizes = sorted({n * length for n in range(1, len(order) + 1) for length in set(lengths)})
    size = sizes[bisect_left(sizes, True, key=lambda size: len(_parts(order, lengths, size)) <= count)]
    parts = _parts(order, lengths, size)
    while len(parts) < count:
        largest = max((part for part in parts if len(part) > 1), key=lambda part: len(part) * lengths[part[-1]])
        where, half = parts.index(largest), len(largest) // 2
        parts[where : where + 1] = [largest[:half], largest[half:]]
    return parts


def _parts(order: list[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """The fewest parts of at most `size` padded tokens (or one example) each."""
    parts: list[list[int]] = []
    for index in order:
        if not parts or (len(parts[-1]) + 1) * lengths[index] > size:
            parts.append([])
        parts[-1].append(index)
    return parts
