"""Batched reading and writing with a key-value cache: what the engine does between two decisions.

A `Batch` holds rows of different requests, adapters and lengths, left-padded in mlx-lm's batch caches. Prompts are read
in pieces, right-padded, then rolled so that every row ends where the next token goes; a row's virtual tokens are in its
cache from the start. One `step` is one forward pass for all rows. `metapeft.serving.native` has its like without MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from metapeft.backbones.forward import run
from metapeft.errors import UserError
from metapeft.runtime import mx, nn
from metapeft.serving.mixed import Mixture, Resident


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; seed None: another each time; logprobs: how many alternatives to tell, None: nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One written token. alternatives: (id, log-probability), most likely first."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Row:
    """A sequence in a batch. `limit`: tokens to write at most."""

    prompt: list[int]
    resident: Resident | None
    limit: int
    sampling: Sampling = Sampling()
    written: list[Token] = field(default_factory=list)
    last: int = 0
    random: np.random.Generator | None = None

    @property
    def length(self) -> int:
        """Places in the cache when all is written."""
        return (self.resident.tokens if self.resident else 0) + len(self.prompt) + self.limit

    def choose(self, logits: np.ndarray, greedy: int) -> Token:
        """The next token. logits: (vocabulary,), needed unless the row is greedy without log-probabilities."""
        sampling = self.sampling
        if self.random is None:
            self.random = np.random.default_rng(sampling.seed)
        id = greedy if sampling.temperature == 0 else sample(logits, sampling, self.random)
        if sampling.logprobs is None:
            return Token(id)
        logs = log_softmax(logits)
        count = sampling.logprobs
        top = np.argpartition(-logs, count)[:count] if count else np.array([], dtype=int)
        best = sorted(((int(i), float(logs[i])) for i in top), key=lambda pair: -pair[1])
        return Token(id, float(logs[id]), tuple(best))

    @property
    def needs_logits(self) -> bool:
        return self.sampling.temperature > 0 or self.sampling.logprobs is not None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def sample(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Softmax at a temperature, cut to the smallest set of tokens that holds `top_p` (Holtzman et al. 2019)."""
    scaled = logits.astype(np.float64) / max(sampling.temperature, 1e-5)
    odds = np.exp(scaled - scaled.max())
    if sampling.top_p >= 1:
        return int(np.searchsorted(np.cumsum(odds), random.random() * odds.sum(), side="right").clip(max=len(odds) - 1))
    order = np.argsort(-odds, kind="stable")
    sums = np.cumsum(odds[order])
    count = int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1
    place = np.searchsorted(sums[:count], random.random() * sums[count - 1], side="right")
    return int(order[min(int(place), count - 1)])


Logits = mx.array | np.ndarray
T = TypeVar("T")
Pieces = Generator[None, None, T]  # a computation that pauses after every piece of it


class Batched(Protocol):
    """What the engine asks of a batch. open: rows may join and leave while prompts are read; nothing is padded."""

    open: bool
    rows: list[Row]
    ahead: mx.array | None

    def join(self, rows: Sequence[Row]) -> None: ...
    def advance(self, tokens: int) -> Logits | None: ...
    def ready(self) -> Batched: ...
    def step(self) -> Logits: ...
    def greedy(self, go_on: bool) -> None: ...
    def extend(self, other: Any) -> None: ...
    def keep(self, places: Sequence[int]) -> None: ...
    def read_all(self, tokens: int) -> Pieces[np.ndarray]: ...
    def peek(self, owners: Sequence[int], paths: Sequence[Sequence[int]]) -> Pieces[list[np.ndarray]]: ...


class Batch:
    """Rows that are computed together.

    `ahead`: the tokens after the last that was written, (rows,), where a step for them was started before anyone asked:
    while it computes, Python prepares the next.
    """

    open = False

    def __init__(self, model: nn.Module, mixture: Mixture, rows: Sequence[Row]):
        self.model, self.mixture = model, mixture
        self.rows = list(rows)
        self.cache: list[Any] = caches(model, [row.resident for row in rows])
        self.waiting: list[Sequence[int]] = [row.prompt for row in rows]
        self.longest = max((len(row.prompt) for row in rows), default=0)
        self.read = 0
        padding = [self.longest - len(row.prompt) for row in rows]
        if self.longest and max(padding) > 0:
            for cache in self.cache:
                cache.prepare(lengths=[len(row.prompt) for row in rows], right_padding=padding)
        self._ends: dict[int, mx.array] = {}
        self.ahead: mx.array | None = None

    def advance(self, tokens: int) -> mx.array | None:
        """Read some `tokens` places of every prompt; the logits after each (rows, vocabulary) when all are read."""
        begin, end = self.read, self.read + max(2, tokens)
        if end + 1 >= self.longest:  # no piece of one token: rotating caches take that for a step
            end = self.longest
        piece = [list(ids[begin:end]) for ids in self.waiting]
        width = end - begin
        ends = [i for i, ids in enumerate(self.waiting) if begin < len(ids) <= end]
        places = [i * width + len(self.waiting[i]) - begin - 1 for i in ends] or [0]
        ids = mx.array([part + [0] * (width - len(part)) for part in piece])
        with self.mixture.rows([row.resident for row in self.rows]):
            logits = run(self.model, ids, cache=self.cache, rows=mx.array(places))[0]
        mx.eval(logits, [cache.state for cache in self.cache])
        self._ends |= {i: logits[n] for n, i in enumerate(ends)}
        self.read = end
        if end < self.longest:
            return None
        if min(map(len, self.waiting)) < self.longest:
            for cache in self.cache:
                cache.finalize()
        return mx.stack([self._ends.pop(i) for i in range(len(self.rows))])

    def join(self, rows: Sequence[Row]) -> None:
        raise AssertionError("a padded batch is closed")

    def ready(self) -> Batch:
        """The rows whose prompts are read: all of them."""
        return self

    def read_all(self, tokens: int) -> Pieces[np.ndarray]:
        """Read the prompts to their ends; the logits after them, (rows, vocabulary) float32."""
        while (logits := self.advance(tokens)) is None:
            yield
        return np.array(logits.astype(mx.float32))

    def peek(self, owners: Sequence[int], paths: Sequence[Sequence[int]]) -> Pieces[list[np.ndarray]]:
        """Logits at every token of each path behind its owner's prompt, (tokens, vocabulary). It ends the batch."""
        yield
        for cache in self.cache:
            cache.filter(mx.array(list(owners)))
        longest = max(len(path) for path in paths)
        ids = mx.array([[*path, *[0] * (longest - len(path))] for path in paths])
        with self.mixture.rows([self.rows[i].resident for i in owners]):
            logits = np.array(run(self.model, ids, cache=self.cache).astype(mx.float32))
        return [part[: len(path)] for part, path in zip(logits, paths, strict=True)]

    def step(self) -> mx.array:
        """Feed every row its last token; the next logits, (rows, vocabulary)."""
        assert self.ahead is None, "what was computed ahead is written first"
        return self._feed(mx.array([row.last for row in self.rows]))

    def greedy(self, go_on: bool) -> None:
        """Append every row's most likely token. go_on: start the step after it too."""
        tokens = self.ahead if self.ahead is not None else mx.argmax(self.step(), axis=-1)
        self.ahead = mx.argmax(self._feed(tokens), axis=-1) if go_on else None
        mx.async_eval(*(part for part in (tokens, self.ahead) if part is not None))
        for row, token in zip(self.rows, np.array(tokens), strict=True):
            row.last = int(token)
            row.written.append(Token(row.last))

    def _feed(self, tokens: mx.array) -> mx.array:
        with self.mixture.rows([row.resident for row in self.rows]):
            return run(self.model, tokens[:, None], cache=self.cache)[:, -1]

    def extend(self, other: Batch) -> None:
        """Take in the rows of another batch whose prompts are read."""
        assert self.ahead is None and other.ahead is None, "what was computed ahead is written first"
        if not self.rows:
            self.cache = other.cache
        else:
            for mine, theirs in zip(self.cache, other.cache, strict=True):
                mine.extend(theirs)
        self.rows += other.rows

    def keep(self, places: Sequence[int]) -> None:
        """Only these rows stay."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in places]
        if self.ahead is not None:
            self.ahead = self.ahead[mx.array(list(places))] if places else None
        if not places:
            self.cache = []
        for cache in self.cache:
            cache.filter(list(places))


def write(rows: Sequence[Row], logits: Logits) -> None:
    """Choose each row's next token from its logits (rows, vocabulary) and append it."""
    needed = [i for i, row in enumerate(rows) if row.needs_logits]
    if isinstance(logits, np.ndarray):
        greedy, chosen = logits.argmax(axis=-1), logits[needed]
    else:
        best, some = mx.argmax(logits, axis=-1), logits[mx.array(needed)].astype(mx.float32) if needed else None
        mx.eval([best] if some is None else [best, some])
        greedy, chosen = np.array(best), np.zeros(0) if some is None else np.array(some)
    values = dict(zip(needed, chosen, strict=True))
    for i, (row, token) in enumerate(zip(rows, greedy, strict=True)):
        row.written.append(row.choose(values.get(i, NOTHING), int(token)))
        row.last = row.written[-1].id


def whole(pieces: Pieces[T]) -> T:
    """What a computation in pieces comes to, without a pause."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result


NOTHING = np.zeros(0, dtype=np.float32)


def caches(model: nn.Module, residents: Sequence[Resident | None]) -> list[Any]:
    """mlx-lm's batch caches, one per layer, that hold each row's virtual tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    prefixes = {id(r): r.prefix for r in residents if r is not None and r.prefix}
    filled: dict[int, list[Any]] = {}
    for key, prefix in prefixes.items():
        assert prefix is not None
        filled[key] = make_prompt_cache(model)
        for cache, (keys, values) in zip(filled[key], prefix, strict=True):
            cache.update_and_fetch(keys, values)
    empty = make_prompt_cache(model)
    rows = [filled.get(id(r), empty) for r in residents]
    return [type(layer[0]).merge(list(layer)) for layer in zip(*rows, strict=True)]


def check(model: nn.Module, mixture: Mixture) -> None:
    """Compute once with rows of unequal length. Raises UserError for an architecture that mlx-lm cannot batch."""
    from mlx_lm.models.cache import make_prompt_cache

    kind = getattr(model, "model_type", type(model).__name__)
    refused = UserError(f"architecture {kind} cannot be served: mlx-lm {_mlx_lm()} cannot batch rows of unequal length")
    if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):
        raise refused
    try:
        rows = [Row([0] * count, None, 2) for count in (3, 7, 11, 19, 40)]  # as many as no model has heads
        batch = Batch(model, mixture, rows)
        logits = batch.advance(40)
        assert logits is not None
        write(rows, logits)
        write(rows, batch.step())
    except ValueError as error:  # an attention of its own that does not take a mask per row
        raise refused from error


def _mlx_lm() -> str:
    from importlib.metadata import version

    return version("mlx-lm")


class Text:
    """Tokens into text as they come: whole characters only, and nothing that may be the start of a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self.decode, self.stop = decode, [s for s in stop if s]
        self.ids: list[int] = []
        self.begin = self.known = 0  # ids[begin:known] are decoded and give the context of what follows
        self.text = ""
        self.sent = 0
        self.stopped = False

    def add(self, id: int, look: bool = True) -> bool:
        """Whether a stop string is complete; the text then ends before it. look: somebody wants the text now."""
        self.ids.append(id)
        if not look and not self.stop:
            return False  # everything is decoded at the end
        before = self.decode(self.ids[self.begin : self.known])
        now = self.decode(self.ids[self.begin :])
        if now.endswith("\ufffd"):  # in the middle of a character
            return False
        self.begin, self.known = self.known, len(self.ids)
        start = len(self.text)
        self.text += now[len(before) :]
        found = [at for s in self.stop if (at := self.text.find(s, max(0, start - len(s)))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self.stopped

    def ready(self, final: bool = False) -> str:
        """What may be sent now."""
        if final and not self.stopped and self.known < len(self.ids):
            before = self.decode(self.ids[self.begin : self.known])
            self.text += self.decode(self.ids[self.begin :])[len(before) :]
            self.known = len(self.ids)
        end = len(self.text)
        if not final and not self.stopped:
            for s in self.stop:
                held = next((n for n in range(min(len(s) - 1, end), 0, -1) if self.text.endswith(s[:n])), 0)
                end = min(end, len(self.text) - held)
        part, self.sent = self.text[self.sent : end], max(end, self.sent)
        return part
