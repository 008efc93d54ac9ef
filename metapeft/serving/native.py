"""The engine's batches as native steps (`metapeft.kernels.serve`): rows that come and go one by one, without padding.

A prompt that begins like an earlier one of the same adapter, be it the template or the conversation so far, takes over
its keys and values. What a row computes depends on its own tokens alone, so this changes no bit of any answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from metapeft.kernels.serve import Cache, LowRank, Native, Part
from metapeft.runtime import mx
from metapeft.serving.generate import Pieces, Row, write
from metapeft.serving.mixed import Resident

REMEMBERED_MB = 256  # keys and values of earlier rows
REMEMBERED = 256  # rows at most: each is compared with every new one
SHORTEST = 4  # tokens that are worth taking over


class Memory:
    """Rows that were read lately, with their caches, by least recent use within a bound in bytes."""

    def __init__(self, bound: float = REMEMBERED_MB * 2**20):
        self.bound, self.bytes = bound, 0
        self.taken = 0  # tokens that need not be read again
        self._rows: OrderedDict[Row, Cache] = OrderedDict()

    def add(self, row: Row, cache: Cache) -> None:
        self._rows[row] = cache
        self.bytes += cache.memory.nbytes
        while self.bytes > self.bound or len(self._rows) > REMEMBERED:
            self.bytes -= self._rows.popitem(last=False)[1].memory.nbytes

    def forget(self, resident: Resident) -> None:
        for row in [row for row in self._rows if row.resident is resident]:
            self.bytes -= self._rows.pop(row).memory.nbytes

    def begin(self, row: Row, cache: Cache) -> int:
        """Fills `cache` with what the row's prompt has in common with the best earlier row; how many tokens that is."""
        prompt = np.array(row.prompt[:-1])  # the last token is always read: its logits are wanted
        virtual = row.resident.tokens if row.resident else 0
        best, most = None, SHORTEST - 1
        for other, held in self._rows.items():
            if other.resident is not row.resident:
                continue
            ids = np.array([*other.prompt, *(t.id for t in other.written)][: held.length - virtual])
            width = min(len(ids), len(prompt))
            differ = np.flatnonzero(ids[:width] != prompt[:width])
            common = int(differ[0]) if len(differ) else width
            if common > most:
                best, most = other, common
        if best is None:
            return 0
        self._rows.move_to_end(best)
        cache.begin_with(self._rows[best], virtual + most)
        self.taken += most
        return most


class Steps:
    """What batches share: the packed model, adapters in its form, and the memory of prompts."""

    def __init__(self, native: Native):
        self.native = native
        self.memory = Memory()
        self._adapters: WeakKeyDictionary[Resident, LowRank] = WeakKeyDictionary()

    def adapter(self, resident: Resident | None) -> LowRank | None:
        if resident is None or not resident.matrices:
            return None
        if resident not in self._adapters:
            self._adapters[resident] = self.native.adapter(resident.matrices)
        return self._adapters[resident]

    def forget(self, resident: Resident) -> None:
        self._adapters.pop(resident, None)
        self.memory.forget(resident)


class NativeBatch:
    """As `metapeft.serving.generate.Batch`, but rows may join and leave while their prompts are read."""

    open = True

    def __init__(self, steps: Steps, rows: Sequence[Row]):
        self.steps = steps
        self.rows: list[Row] = []
        self.caches: list[Cache] = []
        self.read: list[int] = []
        self.ahead: mx.array | None = None  # never: there is nothing to prepare meanwhile
        self.join(rows)

    def join(self, rows: Sequence[Row]) -> None:
        """Rows whose prompts are to be read."""
        for row in rows:
            cache = self.steps.native.cache(row.length)
            known = self.steps.memory.begin(row, cache)
            if not known and row.resident is not None and row.resident.prefix:
                self.steps.native.prefixed(cache, row.resident.prefix)
            self.rows.append(row)
            self.caches.append(cache)
            self.read.append(known)

    def advance(self, tokens: int) -> np.ndarray | None:
        """Read up to `tokens` of every prompt; the logits after those that end here, in order, if any do."""
        pieces = [row.prompt[begin : begin + tokens] for row, begin in zip(self.rows, self.read, strict=True)]
        ends = [begin < len(r.prompt) <= begin + tokens for r, begin in zip(self.rows, self.read, strict=True)]
        logits = self._step(range(len(self.rows)), pieces, [int(end) for end in ends])
        self.read = [begin + len(piece) for begin, piece in zip(self.read, pieces, strict=True)]
        for row, cache, end in zip(self.rows, self.caches, ends, strict=True):
            if end:
                self.steps.memory.add(row, cache)
        return logits if any(ends) else None

    def ready(self) -> NativeBatch:
        """The rows whose prompts are read, which leave this batch."""
        done = [i for i, row in enumerate(self.rows) if self.read[i] == len(row.prompt)]
        batch = NativeBatch(self.steps, [])
        batch.extend(self, done)
        self.keep([i for i in range(len(self.rows)) if i not in set(done)])
        return batch

    def read_all(self, tokens: int) -> Pieces[np.ndarray]:
        """Read the prompts to their ends; the logits after them, (rows, vocabulary). The rows stay."""
        found: dict[int, np.ndarray] = {}
        while len(found) < len(self.rows):
            before = list(self.read)
            logits = self.advance(tokens)
            ended = [i for i, row in enumerate(self.rows) if before[i] < self.read[i] == len(row.prompt)]
            if logits is not None:
                found |= dict(zip(ended, logits, strict=True))
            if len(found) < len(self.rows):
                yield
        return np.stack([found[i] for i in range(len(self.rows))])

    def step(self) -> np.ndarray:
        """Feed every row its last token; the next logits, (rows, vocabulary)."""
        return self._step(range(len(self.rows)), [[row.last] for row in self.rows], [1] * len(self.rows))

    def greedy(self, go_on: bool) -> None:
        """Append every row's most likely token."""
        write(self.rows, self.step())

    def extend(self, other: NativeBatch, places: Sequence[int] | None = None) -> None:
        """Take in rows of another batch."""
        for i in range(len(other.rows)) if places is None else places:
            self.rows.append(other.rows[i])
            self.caches.append(other.caches[i])
            self.read.append(other.read[i])

    def keep(self, places: Sequence[int]) -> None:
        """Only these rows stay."""
        self.rows = [self.rows[i] for i in places]
        self.caches = [self.caches[i] for i in places]
        self.read = [self.read[i] for i in places]

    def peek(self, owners: Sequence[int], paths: Sequence[Sequence[int]]) -> Pieces[list[np.ndarray]]:
        """Logits at every token of each path behind its owner's prompt, (tokens, vocabulary); nothing is kept."""
        found: list[np.ndarray] = [np.zeros(0)] * len(paths)
        left = list(range(len(paths)))
        while left:  # one path of every owner at a time: they use the same places
            now = list({owners[i]: i for i in reversed(left)}.values())
            lengths = [len(paths[i]) for i in now]
            known = [self.caches[owners[i]].length for i in now]
            logits = self._step([owners[i] for i in now], [paths[i] for i in now], lengths)
            for i, length, part in zip(now, known, np.split(logits, np.cumsum(lengths)[:-1]), strict=True):
                self.caches[owners[i]].length = length
                found[i] = part
            left = [i for i in left if i not in now]
            if left:
                yield
        return found

    def _step(self, places: Sequence[int], pieces: Sequence[Sequence[int]], wanted: Sequence[int]) -> np.ndarray:
        parts = [
            Part(piece, self.caches[i], self.steps.adapter(self.rows[i].resident), count)
            for i, piece, count in zip(places, pieces, wanted, strict=True)
            if len(piece)
        ]
        return self.steps.native.step(parts)
