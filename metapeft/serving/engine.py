"""The one owner of the device: a thread that reads prompts, writes tokens and weighs answers for all requests.

Requests come through a bounded queue. Every turn of the loop admits what fits, reads one piece of the prompts that were
admitted last and one of what is to be classified, and writes one token for every row in flight. Rows of different
adapters share one forward pass. Adapters are kept by use within a bound in bytes; one that rows are using stays.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from metapeft.errors import MetapeftError, UserError
from metapeft.kernels import serve
from metapeft.runtime import free_memory_mb, mx
from metapeft.serving.generate import Batch, Batched, Pieces, Row, Sampling, Text, Token, check, write
from metapeft.serving.mixed import Mixture, Resident, read
from metapeft.serving.native import NativeBatch, Steps
from metapeft.serving.score import Answers, Question, score

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

T = TypeVar("T")
GREEDY = Sampling()
BUFFER_MB = 512  # freed arrays that MLX keeps for the next step
READ_TOKENS = 256  # prompt tokens of each kind between two steps: what a row in flight waits for at most
READ_ROWS = 16  # prompts read together
SCORE_ROWS = 32  # questions taken up together


class Busy(MetapeftError):
    """The queue is full. `seconds`: when to try again."""

    def __init__(self, seconds: float):
        super().__init__(f"the server is busy; try again in {seconds:.0f} s")
        self.seconds = seconds


class TooSlow(MetapeftError):
    """The request's time is over."""


class Unavailable(MetapeftError):
    """What was asked for exists, and this server cannot give it now. The cause is for its log, not for the caller."""


class Source(Protocol):
    """What the engine must know of an adapter version to load it."""

    @property
    def key(self) -> str: ...
    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True)
class Piece:
    """Text that is ready, and the tokens behind it. `finished`: "stop", "length", or None while more comes."""

    text: str
    tokens: tuple[Token, ...]
    finished: str | None = None


@dataclass(eq=False)
class Generation:
    """A request to write. `deliver` is called on the engine's thread with a Piece or an exception; it must not block.

    stream: a piece per step; otherwise one with everything. `deadline`: time.monotonic() at which it fails.
    """

    source: Source | None
    prompt: list[int]
    limit: int
    deliver: Callable[[Piece | Exception], None]
    deadline: float
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    stream: bool = False
    virtual: int = 0  # the adapter's tokens, which take places too
    cancelled: bool = False
    row: Row | None = None
    text: Text | None = None
    told: int = 0

    @property
    def places(self) -> int:
        """Prompt and answer together with the adapter's virtual tokens."""
        return self.virtual + len(self.prompt) + self.limit


@dataclass(eq=False)
class Classification:
    """A request to weigh answers: `deliver` gets one array of log-likelihoods per prompt, or an exception."""

    source: Source | None
    prompts: list[list[int]]
    answers: Answers
    deliver: Callable[[list[np.ndarray] | Exception], None]
    deadline: float
    virtual: int = 0
    cancelled: bool = False

    @property
    def places(self) -> int:
        """The adapter's virtual tokens, the longest prompt and the longest path behind it."""
        return self.virtual + max(map(len, self.prompts)) + self.answers.longest


Job = Generation | Classification


@dataclass
class Limits:
    """rows: written at the same time. queue: requests that may wait. adapter_mb: adapters kept in memory."""

    rows: int = 64
    queue: int = 256
    adapter_mb: float = 512.0
    cache_mb: float | None = None  # keys and values; None: a quarter of the free memory


@dataclass
class Counts:
    """What has happened since the start."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of them, those that an earlier row had read
    written_tokens: int = 0
    steps: int = 0
    step_rows: int = 0
    step_seconds: float = 0.0
    read_seconds: float = 0.0
    mixed_steps: int = 0  # steps with more than one adapter
    loads: int = 0
    evictions: int = 0
    refused: int = 0
    questions: int = 0
    failures: int = 0


@dataclass
class _Held:
    resident: Resident
    pins: int = 0


class Engine:
    """`start` loads nothing: the backbone is given. `submit` and `call` may be used from any thread.

    native: compute without MLX where that is possible.
    """

    def __init__(self, backbone: Backbone, limits: Limits | None = None, native: bool = True):
        self.backbone, self.limits = backbone, limits or Limits()
        local = Path(backbone.id).expanduser()
        self.name = local.name if local.is_dir() else backbone.id  # no path leaves the server
        self.counts = Counts()
        packed = serve.native(backbone.model) if native else None
        self.steps = None if packed is None else Steps(packed)
        self.mixture = Mixture(backbone.model)
        if self.steps is None:
            check(backbone.model, self.mixture)  # this also compiles what is compiled once
        self.held: OrderedDict[str, _Held] = OrderedDict()
        self.pending: deque[Generation] = deque()
        self.questions: deque[Classification] = deque()
        self.weighed: list[Classification] = []  # whose answers are being weighed
        self.weighing: Pieces[None] | None = None  # the rest of that work
        self.reading: Batched | None = None
        self.writing = self.batch([])
        self.jobs: dict[Row, Generation] = {}
        self._inbox: queue.SimpleQueue[Job | tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._waiting = 0  # submitted and not yet admitted
        self._lock = threading.Lock()
        self._closing = False
        self._rate = 0.5  # requests finished a second, averaged: for Retry-After
        self._finished_at = time.monotonic()
        self.places = self._cache_places()
        self._thread = threading.Thread(target=self._run, name="metapeft-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def batch(self, rows: Sequence[Row]) -> Batched:
        """Rows to be computed together, as this engine computes."""
        if self.steps is not None:
            return NativeBatch(self.steps, rows)
        return Batch(self.backbone.model, self.mixture, rows)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def flying(self) -> int:
        """Rows being read or written."""
        return len(self.jobs)

    @property
    def resident_bytes(self) -> int:
        return sum(held.resident.bytes for held in list(self.held.values()))

    def submit(self, *jobs: Job) -> None:
        """Queue requests: all or none. Raises Busy when the queue is full, UserError when they can never fit."""
        if (most := max(job.places for job in jobs)) > self.places:
            raise UserError(f"{most} tokens do not fit into the server's cache of {self.places} tokens")
        if len(jobs) > self.limits.queue:
            raise UserError(
                f"this asks for {len(jobs)} answers at once, and {self.limits.queue} may wait here; "
                "send fewer prompts, or a smaller n"
            )
        with self._lock:
            if self._closing:
                raise Busy(5.0)
            if self._waiting + len(jobs) > self.limits.queue:
                self.counts.refused += 1
                raise Busy(max(1.0, min(60.0, self._waiting / max(self._rate, 0.1))))
            self._waiting += len(jobs)
        for job in jobs:
            self._inbox.put(job)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine's thread, between two steps."""
        future: Future[T] = Future()
        self._inbox.put((function, future))
        return future

    def stop(self, seconds: float = 30.0) -> None:
        """Finish what was accepted, for at most so long, then end the thread."""
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            jobs: list[Job] = [*self.jobs.values(), *self.pending, *self.questions, *self.weighed]
            for job in jobs:
                job.cancelled = True
            self._thread.join(10)

    # On the engine's thread from here on.

    def load(self, source: Source) -> Resident:
        """The adapter, from memory or from its folder. Raises UserError when it is damaged or does not fit."""
        if source.key in self.held:
            self.held.move_to_end(source.key)
            return self.held[source.key].resident
        resident = read(source.folder, self.backbone.model, source.key)
        self.counts.loads += 1
        self.held[source.key] = _Held(resident)
        self._evict()
        return resident

    def unload(self, key: str) -> None:
        """Forget an adapter that no row is using."""
        held = self.held.get(key)
        if held is not None and not held.pins:
            del self.held[key]
            self.mixture.forget(held.resident)
            if self.steps is not None:
                self.steps.forget(held.resident)

    def _evict(self) -> None:
        bound = self.limits.adapter_mb * 2**20
        newest = next(reversed(self.held), None)
        for key in list(self.held):
            if self.resident_bytes <= bound:
                return
            if not self.held[key].pins and key != newest:
                self.unload(key)
                self.counts.evictions += 1

    def _cache_places(self) -> int:
        """Tokens whose keys and values fit into the cache's share of memory."""
        from metapeft.backbones.forward import keys_values

        per_token = sum(part.nbytes for pair in keys_values(self.backbone.model, mx.array([[0]])) for part in pair)
        share = self.limits.cache_mb if self.limits.cache_mb is not None else free_memory_mb() / 4
        return max(1, int(share * 2**20 / per_token))

    def _run(self) -> None:
        mx.set_cache_limit(BUFFER_MB * 2**20)
        while True:
            self._receive()
            try:
                self._turn()
            except Exception as error:  # whatever a step failed with: those rows fail, the server goes on
                self.counts.failures += 1
                self._fail_all(error)
            if self._closing and not self._busy():
                break
        mx.clear_streams()

    def _busy(self) -> bool:
        return self._computing() or not self._inbox.empty()

    def _computing(self) -> bool:
        return bool(self.pending or self.questions or self.weighed or self.jobs)

    def _receive(self) -> None:
        block = not self._computing()
        while True:
            try:
                item = self._inbox.get(block=block and not self._closing, timeout=None)
            except queue.Empty:
                return
            block = False
            if isinstance(item, Generation):
                self.pending.append(item)
            elif isinstance(item, Classification):
                self.questions.append(item)
            elif item is not None:
                function, future = item
                try:
                    future.set_result(function())
                except BaseException as error:  # whoever waits for it raises it
                    future.set_exception(error)

    def _turn(self) -> None:
        self._drop()
        if self.reading is None or self.reading.open:
            self._admit()
        if self.questions or self.weighed:
            self._weigh()
        if self.reading is not None:
            self._read()
        if self.writing.rows:
            self._write(go_on=self.reading is None and not self.pending)

    def _drop(self) -> None:
        """Requests that were given up or whose time is over leave."""
        now = time.monotonic()
        waiting: list[Job] = [*self.pending, *self.questions]
        for job in waiting:
            if job.cancelled or job.deadline < now:
                (self.pending if isinstance(job, Generation) else self.questions).remove(job)  # type: ignore[arg-type]
                self._left()
                job.deliver(TooSlow("the request waited longer than its time limit"))
        for question in list(self.weighed):
            if question.cancelled or question.deadline < now:
                self.weighed.remove(question)
                question.deliver(TooSlow("the request took longer than its time limit"))
        if self.weighing is not None and not self.weighed:
            self.weighing.close()
            self.weighing = None
        reading = self.reading.rows if self.reading is not None and self.reading.open else []
        for row in [*self.writing.rows, *reading]:
            flying = self.jobs[row]
            if flying.cancelled or flying.deadline < now:
                flying.deliver(TooSlow("the request took longer than its time limit"))
                self._finish(row)
        self._keep_unfinished()
        if self.reading is not None and self.reading.open:
            self.reading.keep([i for i, row in enumerate(reading) if row in self.jobs])
            if not self.reading.rows:
                self.reading = None

    def _admit(self) -> None:
        """Start to read the oldest requests that fit: rows, cache, and where there is padding, not more than text."""
        rows: list[Row] = []
        reading = [] if self.reading is None else self.reading.rows
        while self.pending and len(reading) + len(rows) < READ_ROWS:
            job = self.pending[0]
            everyone = [*self.writing.rows, *reading, *rows]
            if len(everyone) >= self.limits.rows:
                break
            if everyone and self._held([*(row.length for row in everyone), job.places]) > self.places:
                break
            longest = max((len(row.prompt) for row in rows), default=len(job.prompt))
            if not self.writing.open and not longest / 2 - 8 <= len(job.prompt) <= 2 * longest + 16:
                break
            self.pending.popleft()
            self._left()
            try:
                row = Row(job.prompt, self._pin(job.source), job.limit, job.sampling)
            except Exception as error:
                job.deliver(error)
                continue
            job.row, job.text = row, Text(self._decode, job.stop)
            self.jobs[row] = job
            rows.append(row)
        if rows and self.reading is not None:
            self.reading.join(rows)
        elif rows:
            self.reading = self.batch(rows)

    def _held(self, lengths: Sequence[int]) -> int:
        """Places in the cache that rows of these lengths take together."""
        return sum(lengths) if self.writing.open else len(lengths) * max(lengths)

    def _read(self) -> None:
        batch = self.reading
        assert batch is not None
        begin = time.perf_counter()
        logits = batch.advance(max(16, READ_TOKENS // len(batch.rows)))
        self.counts.read_seconds += time.perf_counter() - begin
        self.counts.reused_tokens = self.steps.memory.taken if self.steps is not None else 0
        if logits is None:
            return
        ready = batch.ready()
        if ready is batch or not batch.rows:
            self.reading = None
        self.counts.prompt_tokens += sum(len(row.prompt) for row in ready.rows)
        write(ready.rows, logits)
        if self.writing.ahead is not None:  # those that join have not fed their last token yet
            self._write(go_on=False)
        joined = list(ready.rows)
        self.writing.extend(ready)
        self._tell(joined)

    def _write(self, go_on: bool) -> None:
        """One token for every row. go_on: nobody waits to join, the next step may start at once."""
        begin = time.perf_counter()
        rows = list(self.writing.rows)
        if any(row.needs_logits for row in rows):
            write(rows, self.writing.step())
        else:
            unfinished = any(len(row.written) + 1 < row.limit for row in rows)
            self.writing.greedy(go_on and unfinished)
        self.counts.steps += 1
        self.counts.step_rows += len(rows)
        self.counts.mixed_steps += len({row.resident for row in rows}) > 1
        self.counts.step_seconds += time.perf_counter() - begin
        self._tell(rows)

    def _tell(self, rows: Sequence[Row]) -> None:
        """Hand out what was just written; rows that are complete leave the batch."""
        ends = self.backbone.tokenizer.eos_token_ids
        self.counts.written_tokens += len(rows)
        for row in rows:
            job = self.jobs[row]
            assert job.text is not None
            over = row.last in ends
            stopped = False if over else job.text.add(row.last, look=job.stream)
            reason = "stop" if over or stopped else "length" if len(row.written) >= job.limit else None
            if reason or job.stream:
                piece = job.text.ready(final=reason is not None)
                if piece or reason:
                    tokens = tuple(row.written[job.told : len(row.written) - over])
                    job.told = len(row.written)
                    job.deliver(Piece(piece, tokens, reason))
            if reason:
                self._finish(row)
        self._keep_unfinished()

    def _finish(self, row: Row) -> None:
        job = self.jobs.pop(row)
        self._unpin(job.source)
        now = time.monotonic()
        self._rate = 0.9 * self._rate + 0.1 / max(now - self._finished_at, 0.01)
        self._finished_at = now

    def _keep_unfinished(self) -> None:
        self.writing.keep([i for i, row in enumerate(self.writing.rows) if row in self.jobs])

    def _weigh(self) -> None:
        """One piece of what is to be classified."""
        if self.weighing is None:
            self.weighing = self._answers()
        try:
            next(self.weighing)
        except StopIteration:
            self.weighing = None

    def _answers(self) -> Pieces[None]:
        """Classify what waits, as many prompts at once as fit; of requests that leave meanwhile no more is weighed.

        A request is answered as soon as its own prompts are weighed. Between two groups of a large one, small ones that
        came meanwhile have their turn.
        """
        jobs: list[Classification] = []
        while self.questions and (not jobs or sum(len(j.prompts) for j in jobs) < SCORE_ROWS):
            jobs.append(self.questions.popleft())
            self._left()
        yield from self._answered(jobs)

    def _small(self) -> list[Classification]:
        """Requests that wait and fit into one group together, the oldest first; they wait no more."""
        found: list[Classification] = []
        for job in list(self.questions):
            if sum(len(j.prompts) for j in [*found, job]) <= READ_ROWS:
                found.append(job)
                self.questions.remove(job)
                self._left()
        return found

    def _answered(self, jobs: Sequence[Classification], within: bool = False) -> Pieces[None]:
        """within: between the groups of others."""
        pinned: list[Classification] = []
        questions: list[tuple[Classification, Question]] = []
        for job in jobs:
            try:
                resident = self._pin(job.source)
            except Exception as error:
                job.deliver(error)
                continue
            pinned.append(job)
            questions += [(job, Question(prompt, job.answers, resident)) for prompt in job.prompts]
        self.weighed += pinned
        try:
            found: dict[Classification, dict[int, np.ndarray]] = {job: {} for job in pinned}
            for n, group in enumerate(self._groups([question for _, question in questions])):
                if n:
                    yield
                    if not within and (small := self._small()):
                        yield from self._answered(small, within=True)
                part = [i for i in group if questions[i][0] in self.weighed]
                some = [questions[i][1] for i in part]
                if not some:
                    continue
                values = yield from score(self.batch([question.row for question in some]), some, READ_TOKENS)
                self.counts.questions += len(some)
                for i, value in zip(part, values, strict=True):
                    found[questions[i][0]][i] = value
                for job in [job for job in pinned if job in self.weighed and len(found[job]) == len(job.prompts)]:
                    self.weighed.remove(job)
                    job.deliver([found[job][i] for i in sorted(found[job])])
        except Exception as error:
            for job in pinned:
                if job in self.weighed:
                    job.deliver(error)
        finally:
            self.weighed = [job for job in self.weighed if job not in pinned]
            for job in pinned:
                self._unpin(job.source)

    def _groups(self, questions: list[Question]) -> list[list[int]]:
        """Questions of similar length that the cache holds together."""
        groups: list[list[int]] = []
        lengths: list[int] = []  # of the rows of the last group; without `open`, every path becomes a row
        for i in sorted(range(len(questions)), key=lambda i: len(questions[i].prompt)):
            mine = [questions[i].row.length] * (1 if self.writing.open else max(1, len(questions[i].answers.paths)))
            if groups and len(groups[-1]) < READ_ROWS and self._held([*lengths, *mine]) <= self.places:
                groups[-1].append(i)
                lengths += mine
            else:
                groups.append([i])
                lengths = mine
        return groups

    def _pin(self, source: Source | None) -> Resident | None:
        if source is None:
            return None
        try:
            resident = self.load(source)
        except Exception as error:
            raise Unavailable("this model cannot be served now; the server's log says why") from error
        self.held[source.key].pins += 1
        return resident

    def _unpin(self, source: Source | None) -> None:
        if source is not None:
            self.held[source.key].pins -= 1
            self._evict()

    def _left(self) -> None:
        with self._lock:
            self._waiting -= 1

    def _fail_all(self, error: Exception) -> None:
        for row in list(self.jobs):
            self.jobs[row].deliver(error)
            self._finish(row)
        self.reading = None
        self.writing = self.batch([])

    def _decode(self, ids: list[int]) -> str:
        return self.backbone.tokenizer.decode(ids) if ids else ""
