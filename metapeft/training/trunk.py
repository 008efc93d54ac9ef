"""Hidden states of the frozen trunk, computed once per example and reused over epochs, evaluations and trials.

Layers below the lowest adapted one never change: their output for an example is a constant. It is kept in memory up to
a bound and in a temporary file beyond it.

The constant does not depend on which examples are computed together, so a trial gives the same result in a sweep as
alone. Rounding in a matrix product depends on where a row lies in the BLAS's blocks; therefore all examples of a chunk
are padded to the same multiple of ALIGN, which depends on the example alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np

from metapeft.backbones.forward import Prefix, PrefixCache, RecordingCache, anatomy, run
from metapeft.kernels.decoder import Decoder, Rows
from metapeft.runtime import mx, nn
from metapeft.training.encode import Encoded
from metapeft.training.workers import Workers

MEMORY_BYTES = 512 * 1024**2
CHUNK_TOKENS = 288  # padded tokens per forward pass: large enough for fast products, small enough for the caches
ALIGN = 12  # rows per block of OpenBLAS's float32 kernels on x86-64


@dataclass
class Room:
    """Bytes of memory left for all the trunks of a session."""

    left: int = MEMORY_BYTES


class Trunk:
    """The input of layer `depth` for every example of one split."""

    def __init__(
        self,
        model: nn.Module,
        depth: int,
        examples: Sequence[Encoded],
        shared: Sequence[int] = (),
        room: Room | None = None,
        lower: Trunk | None = None,
        decoder: Decoder | None = None,
    ):
        """shared: tokens that come before every example (see Session). lower: a trunk of less depth to go on from.

        decoder: the model's native view, if it has one.
        """
        self.model, self.depth, self.examples, self.shared = model, depth, examples, shared
        self.room = Room() if room is None else room
        self.lower = lower
        self.decoder = decoder
        # Of the shared tokens: keys and values by layer, and the input of layer `depth`, (1, tokens, width).
        self.beginning: tuple[Prefix, mx.array] | None = None
        self._memory: dict[int, mx.array] = {}
        self._disk: dict[int, tuple[int, int]] = {}  # index -> (offset, tokens)
        self._file: IO[bytes] | None = None
        self._width = 0
        self._dtype = mx.float32

    def __contains__(self, index: int) -> bool:
        return index in self._memory or index in self._disk

    def get(self, index: int) -> mx.array:
        """(tokens, width) of one example; `prepare` must have seen it."""
        if index in self._memory:
            return self._memory[index]
        assert self._file is not None
        offset, tokens = self._disk[index]
        # Workers read at once, so nobody may move a place in the file that all share.
        raw = np.frombuffer(os.pread(self._file.fileno(), tokens * self._width * self._dtype.size, offset), np.uint8)
        return mx.array(raw).view(self._dtype).reshape(tokens, self._width)

    def stack(self, indices: Sequence[int], length: int) -> mx.array:
        """(examples, length, width), zeros after the end of an example."""
        return mx.stack([mx.pad(h, [(0, length - h.shape[0]), (0, 0)]) for h in map(self.get, indices)])

    def _native(self) -> Decoder | None:
        return self.decoder if self.decoder is not None and self.decoder.covers(stop=self.depth) else None

    def _begin(self) -> tuple[Prefix, mx.array]:
        if (view := self._native()) is not None:
            rows = Rows(view.embed(self.shared), [len(self.shared)], stop=self.depth)
            return view.record(rows), mx.array(rows.hidden[None])
        caches = [RecordingCache() for _ in range(anatomy(self.model).depth)]
        hidden = run(self.model, mx.array([list(self.shared)]), cache=caches, stop=self.depth, logits=False)
        known = [cache.held() for cache in caches[: self.depth]]
        # Layers that are not run get placeholders: masks read the length from them.
        return known + known[:1] * (len(caches) - self.depth), hidden

    def prepare(self, indices: Sequence[int], workers: Workers) -> None:
        """Computes what is missing among `indices`, in chunks of one padded length, spread over the workers."""
        if self.shared and self.beginning is None:
            [self.beginning] = workers.map([self._begin])
        missing = [i for i in dict.fromkeys(indices) if i not in self]
        missing.sort(key=lambda i: (self._from(i), self.examples[i].length))
        chunks: list[list[int]] = []
        for index in missing:
            first = chunks[-1][0] if chunks else None
            if (
                first is None
                or (self._from(first), self._padded(first)) != (self._from(index), self._padded(index))
                or (len(chunks[-1]) + 1) * self._padded(index) > CHUNK_TOKENS
            ):
                chunks.append([])
            chunks[-1].append(index)
        for begin in range(0, len(chunks), 4 * workers.count):  # a few at a time: results move to disk between
            part = chunks[begin : begin + 4 * workers.count]
            for chunk, rows in zip(part, workers.map([partial(self._compute, chunk) for chunk in part]), strict=True):
                for index, row in zip(chunk, rows, strict=True):
                    self._keep(index, row)

    def _from(self, index: int) -> int:
        """The layer whose input is known."""
        return self.lower.depth if self.lower is not None and index in self.lower else 0

    def _padded(self, index: int) -> int:
        return -(-self.examples[index].length // ALIGN) * ALIGN

    def _compute(self, chunk: list[int]) -> list[mx.array] | Callable[[], list[mx.array]]:
        start, length = self._from(chunk[0]), self._padded(chunk[0])
        if (view := self._native()) is not None:
            return partial(self._compute_natively, view, chunk, start, length)
        ids = mx.array([pad(self.examples[i].ids[:-1], length) for i in chunk])
        hidden = self.lower.stack(chunk, length) if start and self.lower is not None else None
        hidden = run(self.model, ids, cache=self._caches(), start=start, hidden=hidden, stop=self.depth, logits=False)
        return [mx.contiguous(hidden[row, : self.examples[i].length]) for row, i in enumerate(chunk)]

    def _compute_natively(self, view: Decoder, chunk: list[int], start: int, length: int) -> list[mx.array]:
        rows = np.zeros((len(chunk), length, view.width), np.float32)
        for row, index in zip(rows, chunk, strict=True):
            own = self.examples[index].length
            if start and self.lower is not None:
                row[:own] = self.lower.get(index)
            else:
                row[:own] = view.embed(self.examples[index].ids[:-1])
        prefix = None if self.beginning is None else self.beginning[0]
        ends = range(length, len(chunk) * length + 1, length)
        found = Rows(rows.reshape(-1, view.width), list(ends), prefix=prefix, start=start, stop=self.depth)
        hidden = view.forward(found).reshape(rows.shape)
        return [mx.array(hidden[row, : self.examples[i].length]) for row, i in enumerate(chunk)]

    def _caches(self) -> list[PrefixCache] | None:
        if self.beginning is None:
            return None
        return [PrefixCache(keys, values) for keys, values in self.beginning[0]]

    def _keep(self, index: int, row: mx.array) -> None:
        self._width, self._dtype = row.shape[1], row.dtype
        if row.nbytes <= self.room.left:
            self.room.left -= row.nbytes
            self._memory[index] = row
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the trunk; the system removes it
        offset = self._file.seek(0, 2)
        self._file.write(np.array(row.view(mx.uint8)).tobytes())
        self._file.flush()  # `get` reads from the system
        self._disk[index] = (offset, row.shape[0])


def pad(ids: Sequence[int], length: int) -> list[int]:
    """Right padding: with causal attention it changes nothing at the real positions."""
    return [*ids, *([0] * (length - len(ids)))]
