"""The engine without HTTP: versions in flight, bounds, time limits, failures."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metapeft.errors import UserError
from metapeft.serving.engine import Busy, Classification, Engine, Generation, Limits, Piece, TooSlow, Unavailable
from metapeft.serving.generate import Sampling
from metapeft.serving.score import Answers
from tests.backbones.tiny import tiny
from tests.serving.made import save


@dataclass(frozen=True)
class Folder:
    key: str
    folder: Path


class Asked:
    """A request and what came of it."""

    def __init__(self, source: Folder | None, prompt: str = "abc", limit: int = 30, seconds: float = 60, **more: Any):
        self.events: queue.Queue[Any] = queue.Queue()
        ids = list(tiny("llama").tokenizer.encode(prompt))
        self.job = Generation(source, ids, limit, self.events.put, time.monotonic() + seconds, **more)

    def result(self) -> Any:
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            if event.finished:
                return event.text


@pytest.fixture(params=["native", "mlx"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    running = Engine(tiny("llama"), Limits(rows=4, queue=6), native=request.param == "native")
    running.start()
    yield running
    running.stop(20)
    assert not running.alive


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Folder]:
    root = tmp_path_factory.mktemp("adapters")
    made = [save(root / str(n), tiny("llama"), method, n) for n, method in enumerate(("lora", "lora", "prompt"))]
    return [Folder(path.name, path) for path in made]


def ask(engine: Engine, *arguments: Any, **more: Any) -> Asked:
    asked = Asked(*arguments, **more)
    engine.submit(asked.job)
    return asked


def test_what_others_do_changes_no_answer(engine: Engine, folders: list[Folder]) -> None:
    """The same request alone, and in the middle of a crowd that comes and goes."""
    alone = {f.key: ask(engine, f, "some prompt", 40).result() for f in folders}
    crowd: list[Asked] = []
    for n in range(6):
        crowd.append(ask(engine, folders[n % 3], "some prompt", 40))
        time.sleep(0.02)
    for n, asked in enumerate(crowd):
        assert asked.result() == alone[folders[n % 3].key]


def test_greedy_and_drawn_rows_mix(engine: Engine, folders: list[Folder]) -> None:
    """Steps that are computed ahead are for greedy rows: drawn ones come and go between them."""
    alone = ask(engine, folders[1], "another", 60).result()
    drawn = ask(engine, folders[0], "x", 20, sampling=Sampling(1.0, seed=3)).result()
    flying = ask(engine, folders[1], "another", 60)
    for _ in range(4):
        assert ask(engine, folders[0], "x", 20, sampling=Sampling(1.0, seed=3)).result() == drawn
    assert flying.result() == alone


def test_an_adapter_in_use_stays_though_there_is_no_room(folders: list[Folder]) -> None:
    engine = Engine(tiny("llama"), Limits(adapter_mb=0))
    engine.start()
    wanted = ask(engine, folders[0], "x", 120).result()
    flying = ask(engine, folders[0], "x", 120)
    others = [ask(engine, folders[1], "x", 5) for _ in range(3)]
    assert [other.result() for other in others] == [others[0].job.text.text] * 3  # type: ignore[union-attr]
    assert flying.result() == wanted
    assert len(engine.held) <= 1 and engine.counts.evictions >= 1
    engine.stop(20)


def test_a_full_queue_and_a_closed_engine_refuse(engine: Engine) -> None:
    gate = threading.Event()
    engine.call(gate.wait)  # the engine's thread is held: all requests wait
    taken = [ask(engine, None, "x", 3) for _ in range(6)]
    with pytest.raises(Busy) as refused:
        ask(engine, None, "x", 3)
    assert 1 <= refused.value.seconds <= 60
    gate.set()
    assert len({asked.result() for asked in taken}) == 1
    engine.stop(20)
    with pytest.raises(Busy):
        ask(engine, None)


def test_what_asks_for_several_answers_gets_all_places_or_none(engine: Engine) -> None:
    gate = threading.Event()
    engine.call(gate.wait)  # the engine's thread is held: all requests wait
    taken = [ask(engine, None, "x", 3) for _ in range(3)]
    several = [Asked(None, "x", 3) for _ in range(7)]
    with pytest.raises(Busy):
        engine.submit(*(asked.job for asked in several[:4]))
    assert engine.waiting == 3
    with pytest.raises(UserError, match="7 answers at once, and 6 may wait"):
        engine.submit(*(asked.job for asked in several))
    engine.submit(*(asked.job for asked in several[:3]))
    gate.set()
    assert len({asked.result() for asked in [*taken, *several[:3]]}) == 1


def weighing(prompts: int, deliver: Any, source: Folder | None = None) -> Classification:
    """A request that takes a dozen turns, with paths of two tokens."""
    answers = Answers.of([(1, 2, 3), (1, 2, 4), (5,)])
    return Classification(source, [[n, *[7] * 60] for n in range(prompts)], answers, deliver, time.monotonic() + 60)


def test_what_is_long_to_weigh_keeps_nobody_waiting_and_changes_no_bit(engine: Engine, folders: list[Folder]) -> None:
    alone: queue.Queue[Any] = queue.Queue()
    for source in (None, folders[0], folders[2]):
        engine.submit(weighing(100, alone.put, source))
        wanted = alone.get(timeout=60)
        gate, events = threading.Event(), queue.Queue[tuple[str, Any]]()
        engine.call(gate.wait)
        engine.submit(weighing(100, lambda event, events=events: events.put(("weighed", event)), source))
        asked = Asked(folders[1], "x", 3)
        asked.job.deliver = lambda event, events=events: events.put(("written", event))
        engine.submit(asked.job)
        gate.set()
        assert events.get(timeout=60)[0] == "written"
        which, found = events.get(timeout=60)
        assert which == "weighed" and all((a == b).all() for a, b in zip(found, wanted, strict=True))


def test_what_is_quick_to_weigh_does_not_wait_for_what_is_long(engine: Engine, folders: list[Folder]) -> None:
    """Neither beside it nor behind it, and both come to what they come to alone."""
    alone: queue.Queue[Any] = queue.Queue()
    wanted = {}
    for prompts in (1, 2, 100):
        engine.submit(weighing(prompts, alone.put, folders[0]))
        wanted[prompts] = alone.get(timeout=60)
    gate, events = threading.Event(), queue.Queue[tuple[int, Any]]()

    def put(prompts: int) -> Any:
        return lambda event: events.put((prompts, event))

    def later(event: Any) -> None:
        put(1)(event)
        engine.submit(weighing(2, put(2), folders[0]))

    engine.call(gate.wait)
    engine.submit(weighing(1, later, folders[0]))
    engine.submit(weighing(100, put(100), folders[0]))
    gate.set()
    found = [events.get(timeout=60) for _ in range(3)]
    assert [prompts for prompts, _ in found] == [1, 2, 100]
    for prompts, logs in found:
        assert len(logs) == prompts
        assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(logs, wanted[prompts], strict=True))
    assert engine.waiting == 0 and not any(held.pins for held in engine.held.values())


@pytest.mark.parametrize("how", ["gone", "late"])
def test_what_is_being_weighed_ends_when_nobody_waits_for_it(engine: Engine, folders: list[Folder], how: str) -> None:
    events: queue.Queue[Any] = queue.Queue()
    job = weighing(40, events.put, folders[0])
    asked = Asked(None, "x", 3, stream=True)

    def first(event: Any) -> None:  # on the engine's thread, some turns after the other began
        job.cancelled, job.deadline = how == "gone", 0.0 if how == "late" else job.deadline

    asked.job.deliver = first
    gate = threading.Event()
    engine.call(gate.wait)
    engine.submit(job)
    engine.submit(asked.job)
    gate.set()
    with pytest.raises(TooSlow, match="took longer"):
        raise events.get(timeout=60)
    assert engine.call(lambda: engine.counts.questions).result() < 40
    assert not any(held.pins for held in engine.held.values()) and engine.waiting == 0
    engine.submit(weighing(3, events.put, folders[0]))
    assert len(events.get(timeout=60)) == 3


def test_time_limits_hold_in_the_queue_and_in_flight(engine: Engine) -> None:
    gate = threading.Event()
    engine.call(gate.wait)
    late = ask(engine, None, "x", 5, seconds=0.05)
    time.sleep(0.1)
    gate.set()
    with pytest.raises(TooSlow):
        late.result()
    short = Asked(None, "x", 400, seconds=0.5, stream=True)
    begun = short.job.deliver

    def slowly(event: Any) -> None:  # the engine's thread is held between two tokens until the time is over
        time.sleep(max(0.0, short.job.deadline - time.monotonic()) + 0.01)
        begun(event)

    short.job.deliver = slowly
    engine.submit(short.job)
    with pytest.raises(TooSlow, match="took longer"):
        short.result()
    assert ask(engine, None, "x", 3).result()
    assert engine.flying == 0 and engine.waiting == 0


def test_what_never_fits_is_refused_at_once() -> None:
    engine = Engine(tiny("llama"), Limits(cache_mb=0.05))  # some 50 tokens
    with pytest.raises(UserError, match="do not fit"):
        ask(engine, None, "x", 400)


def test_the_cache_bounds_how_many_write_at_once() -> None:
    engine = Engine(tiny("llama"), Limits(cache_mb=0.1))
    room = engine.places // 31
    assert 1 <= room < 10
    engine.start()
    asked = [Asked(None, "x", 30, stream=True) for _ in range(10)]
    flying: list[int] = []
    for one in asked:

        def deliver(event: Any, one: Asked = one) -> None:  # on the engine's thread, after every step
            flying.append(engine.flying)
            one.events.put(event)

        one.job.deliver = deliver
        engine.submit(one.job)
    assert len({a.result() for a in asked}) == 1
    assert 1 <= max(flying) <= room
    engine.stop(20)


def test_a_failing_step_fails_its_rows_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    engine.call(lambda: monkeypatch.setattr(engine.writing, "greedy", lambda go_on: fail())).result()
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(engine, None, "x", 5).result()
    assert ask(engine, None, "x", 5).result() and engine.counts.failures == 1


def test_an_adapter_that_cannot_be_read_fails_its_own_request(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be served now") as failed:
        ask(engine, Folder("none", tmp_path)).result()
    assert "no adapter" in str(failed.value.__cause__) and str(tmp_path) not in str(failed.value)
    answers: queue.Queue[Any] = queue.Queue()
    broken = Classification(
        Folder("none", tmp_path), [[65]], Answers.of([(1,), (2,)]), answers.put, time.monotonic() + 9
    )
    good = Classification(None, [[65], [66, 67]], Answers.of([(1,), (2,)]), answers.put, time.monotonic() + 9)
    engine.submit(broken)
    engine.submit(good)
    found = [answers.get(timeout=30), answers.get(timeout=30)]
    assert sorted(type(f).__name__ for f in found) == ["Unavailable", "list"]
    assert ask(engine, None, "x", 5).result()


def test_pieces_of_a_stream_are_the_whole_text(engine: Engine, folders: list[Folder]) -> None:
    whole = ask(engine, folders[0], "day", 25).result()
    asked = ask(engine, folders[0], "day", 25, stream=True)
    text, tokens, last = "", 0, None
    while last is None:
        piece: Piece = asked.events.get(timeout=30)
        text, tokens, last = text + piece.text, tokens + len(piece.tokens), piece.finished
    assert text == whole and tokens <= 25
