"""Hidden states of the frozen trunk, computed once per example and reused over epochs, evaluations and trials.

Layers below the lowest adapted one never change: their output for an example is a constant. It is kept in memory up to a
bound and in a temporary file beyond it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np

from metapeft.backbones.forward import Prefix, PrefixCache, anatomy, extended, run
from metapeft.runtime import mx, nn
from metapeft.training.encode import Encoded

MEMORY_BYTES = 2 * 1024**3
CHUNK_TOKENS = 1024


class Trunk:
    """The input of layer `depth` for every example of one split."""

    def __init__(
        self,
        model: nn.Module,
        depth: int,
        examples: Sequence[Encoded],
        shared: Sequence[int] = (),
        memory_bytes: int = MEMORY_BYTES,
    ):
        """shared: tokens that come before every example (see Session)."""
        self.model, self.depth, self.examples, self.shared = model, depth, examples, shared
        self._beginning: tuple[Prefix, mx.array] | None = None
        self.room = memory_bytes
        self.memory: dict[int, mx.array] = {}
        self.disk: dict[int, tuple[int, int]] = {}  # index -> (offset, tokens)
        self.file: IO[bytes] | None = None
        self.width = 0
        self.dtype = mx.float32

    def get(self, index: int) -> mx.array:
        """(tokens, width) of one example; `prepare` must have seen it."""
        if index in self.memory:
            return self.memory[index]
        assert self.file is not None
        offset, tokens = self.disk[index]
        self.file.seek(offset)
        raw = np.frombuffer(self.file.read(tokens * self.width * self.dtype.size), dtype=np.uint8)
        return mx.array(raw).view(self.dtype).reshape(tokens, self.width)

    def beginning(self) -> mx.array:
        """The input of layer `depth` at the shared tokens, (1, tokens, width)."""
        if self._beginning is None:
            ids = mx.array([list(self.shared)])
            hidden = run(self.model, ids, stop=self.depth, logits=False)
            self._beginning = (extended(self.model, None, self.shared, 0, None)[: self.depth], hidden)
            mx.eval(self._beginning)
        return self._beginning[1]

    def _caches(self) -> list[PrefixCache] | None:
        if not self.shared:
            return None
        self.beginning()
        assert self._beginning is not None
        below = [PrefixCache(keys, values) for keys, values in self._beginning[0]]
        return below + [PrefixCache(*below[0].prefix)] * (anatomy(self.model).depth - self.depth)

    def prepare(self, indices: Sequence[int], streams: Sequence[mx.Stream]) -> None:
        """Computes what is missing among `indices`, in chunks of similar length, spread over the streams."""
        missing = [i for i in dict.fromkeys(indices) if i not in self.memory and i not in self.disk]
        missing.sort(key=lambda i: self.examples[i].length)
        chunks: list[list[int]] = [[]]
        for index in missing:
            if chunks[-1] and (len(chunks[-1]) + 1) * self.examples[index].length > CHUNK_TOKENS:
                chunks.append([])
            chunks[-1].append(index)
        if not missing:
            return
        for start in range(0, len(chunks), len(streams)):
            results = []
            for chunk, stream in zip(chunks[start : start + len(streams)], streams, strict=False):
                longest = max(self.examples[i].length for i in chunk)
                ids = mx.array([pad(self.examples[i].ids[:-1], longest) for i in chunk])
                with mx.stream(stream):
                    hidden = run(self.model, ids, cache=self._caches(), stop=self.depth, logits=False)
                    results.append([mx.contiguous(hidden[row, : self.examples[i].length]) for row, i in enumerate(chunk)])
            mx.eval(results)
            for chunk, rows in zip(chunks[start : start + len(streams)], results, strict=False):
                for index, row in zip(chunk, rows, strict=True):
                    self._keep(index, row)

    def _keep(self, index: int, row: mx.array) -> None:
        self.width, self.dtype = row.shape[1], row.dtype
        if row.nbytes <= self.room:
            self.room -= row.nbytes
            self.memory[index] = row
            return
        if self.file is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the trunk; the system removes it
        offset = self.file.seek(0, 2)
        self.file.write(np.array(row.view(mx.uint8)).tobytes())
        self.disk[index] = (offset, row.shape[0])


def pad(ids: Sequence[int], length: int) -> list[int]:
    """Right padding: with causal attention it changes nothing at the real positions."""
    return [*ids, *([0] * (length - len(ids)))]
