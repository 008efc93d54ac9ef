"""Growing the experience: runs the trials of the plan (`metapeft.meta.plan`) one visit of a task after another.

A trial that is in the experience is never run again; one that is being run is claimed by a lock that dies with its
process. So growing may be killed, repeated, and done by several processes at once, which share the work. A trial that
was cut goes on where its last state was saved. Adapters are offered to the library (`metapeft.meta.library`), which
keeps the best of every task and method.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.errors import MetapeftError, Unfit, UserError
from metapeft.meta.experience import Experience
from metapeft.meta.plan import FIRST, Cell, Place, Plan, configurations
from metapeft.progress import say
from metapeft.search.locks import FileLocks
from metapeft.search.slots import Slots
from metapeft.settings import DataSettings, home
from metapeft.training.engine import engine
from metapeft.training.trial import Trial, trial_id

if TYPE_CHECKING:
    from metapeft.backbones import Backbone
    from metapeft.profiling import Profile
    from metapeft.training.session import Session

STEPS = 40
DATA = DataSettings(max_train=600, max_validation=64, max_test=300)
SMALL = DATA.model_copy(update={"max_train": 64})  # two in five of the tasks that are much larger are measured so too
REPEATED_SEED = 1  # every fourth task is measured with this seed too
FAILURES = 4  # errors in a row that end the growth: something other than the configurations is broken
SKETCHED = 64  # rows whose tokens tell what a task will cost
PROBED = 400  # examples that a profile and the untuned score look at, about

Load = Callable[[str, DataSettings], Task]
Report = Callable[["Grown", Trial], None]


@dataclass
class Grown:
    """What a call of `grow` did, and what it expects."""

    cells: int = 0  # of the whole plan
    known: int = 0  # of them, how many were in the experience before
    predicted_seconds: float = 0.0  # for the rest
    trials: int = 0  # run by this call
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # task -> why it cannot be used
    complete: bool = False  # nothing of the plan is left
    interrupted: bool = False
    slowness: float = 1.0  # measured seconds of a trial over predicted ones

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def count(self, trial: Trial, seconds: float, predicted: float) -> None:
        """One more trial, `seconds` after the start; `predicted`: by the plan, for the rest."""
        self.trials += 1
        self.seconds = seconds
        self.statuses[trial.status] = self.statuses.get(trial.status, 0) + 1
        if trial.task not in self.tasks:
            self.tasks.append(trial.task)
        self.predicted_seconds = predicted * self.slowness


def grow(
    tasks: Sequence[str],
    backbone: Backbone,
    *,
    max_seconds: float | None = None,
    max_trials: int | None = None,
    steps: int = STEPS,
    sizes: tuple[DataSettings, DataSettings] = (DATA, SMALL),
    load: Load | None = None,
    on_plan: Callable[[Grown], None] | None = None,
    on_trial: Report | None = None,
) -> Grown:
    """Runs what teaches most per second until the time, the trials or the plan are at their end.

    on_plan: called once, when the costs are known; on_trial: after every trial. Ctrl-C and SIGTERM end it early, which
    is no error: `interrupted` says so. Raises UserError when no task can be used, MetapeftError when tasks cannot be
    downloaded and when several trials in a row fail.
    """
    from metapeft.data import load_task

    grown = Grown()
    store = Experience()
    until = time.monotonic() + (float("inf") if max_seconds is None else max_seconds)
    begin = time.monotonic()
    work = _Work(tasks, backbone, steps, sizes, load or load_task, grown, until)
    with _stoppable(grown):
        places, cells = work.table()
        plan = Plan(places, cells)
        done = {trial.id for trial in store.trials()}
        for cell in cells:
            if cell.id in done:  # a kill came between the record and the library
                shutil.rmtree(_folder(cell.id), ignore_errors=True)
        grown.cells, grown.known = len(cells), sum(cell.id in done for cell in cells)
        work.learn(store.trials(), cells)
        grown.predicted_seconds = plan.seconds(done) * grown.slowness
        if on_plan is not None:
            on_plan(grown)
        visits = failures = 0
        while max_trials is None or grown.trials < max_trials:
            with _claimed(plan, store, (until - time.monotonic()) / grown.slowness, visits) as visit:
                before = grown.trials
                for trial in work.run(visit, store):
                    done.add(trial.id)
                    failures = failures + 1 if trial.status == "failed" else 0
                    grown.count(trial, time.monotonic() - begin, plan.seconds(done))
                    if on_trial is not None:
                        on_trial(grown, trial)
                    if failures == FAILURES:
                        raise MetapeftError(f"{FAILURES} trials failed in a row, the last one with: {trial.error}")
                    if grown.trials == max_trials:
                        break
            visits += 1
            if grown.trials == before:
                break
        done = {trial.id for trial in store.trials()}
        grown.complete = all(cell.id in done for cell in cells)
    grown.seconds = time.monotonic() - begin
    return grown


@contextmanager
def _stoppable(grown: Grown) -> Iterator[None]:
    """SIGINT and SIGTERM end the block (a shell starts background work with SIGINT ignored)."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        grown.interrupted = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _claimed(plan: Plan, store: Experience, remaining: float, visits: int) -> Iterator[list[Cell]]:
    """The next visit, held for this process until the block ends; empty when there is none."""
    locks = FileLocks(home() / "experience" / "claims")
    try:
        with locks.exclusive():
            taken = {cell.id for cell in plan.cells if locks.held(cell.id)}
            taken |= {trial.id for trial in store.trials()}  # read after the claims: what ends in between is in one
            visit = plan.visit(taken, remaining, visits)
            for cell in visit:
                locks.hold(cell.id)
        yield visit
    finally:
        locks.close()


class _Work:
    """Tasks and the backbone: what the table is made of, and how its cells are run."""

    def __init__(
        self,
        tasks: Sequence[str],
        backbone: Backbone,
        steps: int,
        sizes: tuple[DataSettings, DataSettings],
        load: Load,
        grown: Grown,
        until: float,
    ):
        self.tasks, self.backbone, self.steps, self.sizes, self.load = tasks, backbone, steps, sizes, load
        self.grown, self.until = grown, until
        self.slots = Slots(1)
        self.origin: list[tuple[str, DataSettings]] = []  # of each place: the task as it was given, for a file its path
        self.ratios: list[float] = []

    def table(self) -> tuple[list[Place], list[Cell]]:
        """Every place and cell, with predicted seconds."""
        from metapeft.backbones.forward import anatomy

        rows = configurations(anatomy(self.backbone.model).depth)
        places: list[Place] = []
        cells: list[Cell] = []
        large = 0
        kind: type[MetapeftError] = UserError
        for number, name in enumerate(self.tasks):
            full, small = self.sizes
            try:
                task = self.load(name, full)
            except MetapeftError as error:
                self.grown.skipped[name] = str(error)
                kind = kind if isinstance(error, UserError) else MetapeftError  # the network, for example
                continue
            self._add(name, task, full, rows, number % 4 == 1, places, cells)
            if len(task.train) >= 4 * small.max_train:
                if large % 5 in (0, 3):
                    self._add(name, self.load(name, small), small, rows, False, places, cells)
                large += 1
        if not places:
            raise kind("no task can be used: " + "; ".join(self.grown.skipped.values()))
        return places, cells

    def _add(
        self,
        given: str,
        task: Task,
        data: DataSettings,
        rows: list[dict[str, Any]],
        repeat: bool,
        places: list[Place],
        cells: list[Cell],
    ) -> None:
        from metapeft.meta.costs import cost
        from metapeft.profiling import speed

        profile, rate = sketch(task, self.backbone), speed.of(self.backbone)
        features = profile.features
        tokens = features["prompt_tokens_mean"] + features["completion_tokens_mean"] - features["shared_tokens"]
        untuned = rate.forward * tokens * (PROBED + len(task.test))
        place = len(places)
        places.append(Place(task.name, task.family or task.name, len(task.train), len(task.test), 2.0 + untuned))
        self.origin.append((given, data))
        backbone = self.backbone.identity
        for number, row in enumerate(rows):
            if not profile.shapes.takes(row["method"]):
                continue
            costs = cost(row, profile, rate, self.steps)
            for seed in (0, REPEATED_SEED) if repeat else (0,):
                identity = trial_id(
                    task.name, task.version, backbone, row, seed, self.steps, len(task.train), metric=task.metric
                )
                late, again = number >= len(FIRST), seed != 0
                cells.append(Cell(identity, place, row, seed, costs.seconds, costs.peak_memory_mb, late, again))

    def run(self, visit: Sequence[Cell], store: Experience) -> Iterator[Trial]:
        """Runs and records the cells of one place while there is time, taking turns with this machine's sweeps."""
        from metapeft.profiling import profile
        from metapeft.training.session import Session

        if not visit:
            return
        name, data = self.origin[visit[0].place]
        task = self.load(name, data)
        measured = profile(task, self.backbone)
        session = Session(self.backbone, task)
        for cell in visit:
            if time.monotonic() + cell.seconds * self.grown.slowness > self.until:
                continue
            deadline = None if self.until == float("inf") else self.until
            with self.slots.place(deadline) as turn:
                if turn is None or not turn.begin(cell.memory_mb, deadline):
                    return
                trial = self._trial(session, cell)
            trial.profile_version = measured.version
            trial.versions["engine"] = f"{engine()} {way(session)}"
            store.append(replace(trial, adapter=""))
            self._offer(cell, trial, task, measured)
            self.learn([trial], visit)
            yield trial

    def learn(self, trials: Sequence[Trial], cells: Sequence[Cell]) -> None:
        """How far predicted seconds are off here, from the last trials of this processor and engine."""
        from metapeft.runtime import processor

        predicted = {cell.id: cell.seconds for cell in cells}
        for trial in trials:
            mine = (processor(), engine()) == (trial.versions.get("processor"), trial.versions.get("engine", "")[:6])
            if mine and trial.id in predicted and trial.status == "ok":
                self.ratios.append(trial.seconds / predicted[trial.id])
        self.grown.slowness = statistics.median(self.ratios[-50:] or [1.0])

    def _trial(self, session: Session, cell: Cell) -> Trial:
        from metapeft.training.trainer import run_trial

        try:
            trial = run_trial(session, cell.configuration, steps=self.steps, seed=cell.seed, folder=_folder(cell.id))
        except Unfit as error:
            trial = self._failed(session.task, cell, str(error))
        except (UserError, OSError):  # a full disk, for example: no fault of the configuration
            raise
        except Exception as error:  # the growth outlives a broken trial, and keeps it
            trial = self._failed(session.task, cell, f"{type(error).__name__}: {error}")
        return trial

    def _offer(self, cell: Cell, trial: Trial, task: Task, measured: Profile) -> None:
        """The library keeps the task's best adapters; the others go."""
        from metapeft.meta import library

        try:
            library.offer(_folder(cell.id), trial, task, measured)
        except (UserError, OSError) as error:
            say(f"grow: the adapter of {trial.id} was not kept: {error}")
        shutil.rmtree(_folder(cell.id), ignore_errors=True)

    def _failed(self, task: Task, cell: Cell, error: str) -> Trial:
        """The record of a trial that left none itself."""
        from metapeft.runtime import device, processor, versions

        return Trial(
            id=cell.id,
            task=task.name,
            task_version=task.version,
            backbone=self.backbone.id,
            method=cell.configuration["method"],
            configuration=cell.configuration,
            seed=cell.seed,
            budget=self.steps,
            status="failed",
            error=error,
            device=device(),
            versions=versions() | {"processor": processor()},
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            train_examples=len(task.train),
        )


def _folder(identity: str) -> Path:
    """Of a trial's state while it runs, and of its adapter until the library has seen it."""
    return home() / "growing" / identity


def way(session: Session) -> str:
    return "native" if getattr(session, "decoder", None) is not None else "mlx"


def sketch(task: Task, backbone: Backbone) -> Any:
    """A Profile with what predicting costs needs and no more, from a sample of the rows: no pass of the backbone."""
    from metapeft.profiling import text
    from metapeft.profiling.profiles import VERSION, Profile
    from metapeft.profiling.shapes import shapes
    from metapeft.training.encode import encode

    encoded = [encode(example, backbone.tokenizer) for example in task.train[:SKETCHED]]
    return Profile(
        version=VERSION,
        task=task.name,
        task_version=task.version,
        backbone=backbone.id,
        backbone_content=backbone.content_id,
        features=text.size(task, encoded),
        names=(),
        embedding=(),
        shapes=shapes(backbone.model),
    )
