"""A sweep: Bayesian multi-objective search over configurations, by one worker or many, that no kill can corrupt.

Search and execution are apart: `run` trains one configuration and returns its record; here it is decided which one is
next (Optuna's TPE by ask and tell) and what is written down, in the study's database. Every step of the bookkeeping is
made under the study's lock and is safe to be cut anywhere:

- a trial is claimed (asked, its configuration and its worker written), trained, recorded, told;
- a claimed trial whose worker is dead is told if its record is there, else queued again, once;
- trials that were told are never run again, and a repeated command continues its study.

What TPE is told. Optuna's TPE ignores trials in state FAIL, so that a region where everything fails looks unexplored
and draws it in: with one of five methods always failing, over half of all later trials went there. Trials that did not
end well, or break a limit, are therefore told as complete with a positive constraint: TPE then puts them among the bad
ones whatever their values, and Optuna keeps them off its front.

Luck. The best of many noisy scores is too good to be true, so the last trials repeat the configurations on the front
with other seeds, those with a name first; what is reported is their mean (`pareto.averaged`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from metapeft.data.task import Task
from metapeft.errors import MetapeftError, Unfit, UserError
from metapeft.progress import say
from metapeft.search import pareto, spaces
from metapeft.search.locks import DatabaseLocks, FileLocks, Locks
from metapeft.search.stopping import StopRule
from metapeft.settings import Settings, brief, home, shown
from metapeft.training.configuration import full
from metapeft.training.trial import Trial, trial_id

if TYPE_CHECKING:
    import optuna

P = ParamSpec("P")
T = TypeVar("T")
Watch = Callable[[dict[str, Any]], bool]  # gets a training's events; True stops it
Run = Callable[[dict[str, Any], int, int, str, Watch | None], Trial]  # (configuration, seed, steps, trial id, watch)
Report = Callable[[Trial, int, int], None]  # (the trial that ended, how many have, how many will)
REPEATED_FIRST = ("most accurate", "balanced", "fastest", "smallest")
DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = ("maximize", "minimize", "minimize", "minimize")
STORAGE = "METAPEFT_SWEEP_STORAGE"  # the environment, not params.yaml: a database's URL holds a password
RETRY_SECONDS = 1.0
POLL_SECONDS = 2.0  # between two looks at what other workers have in hand
TRIES = 20  # proposals of a configuration that was tried before, until the space counts as exhausted
FAILURES = 4  # errors in a row that end a sweep: something other than the configurations is broken
MOST_SEEDS = 3  # trainings of one configuration
AGAIN = ("repeated", "released")  # void, for they are begun anew
STOPPED = 1.0  # how infeasible a stopped trial counts: bad, but not as bad as one that failed
PATIENCE = 600.0  # seconds that a database may be away (a restart, a failover) before the sweep gives up
LOST = "its worker was killed twice while training it; often the machine ran out of memory"


@dataclass(frozen=True)
class Limits:
    """Hard constraints on a trial: training seconds and peak memory in MiB."""

    seconds: float | None = None
    memory_mb: float | None = None


@dataclass
class Sweep:
    """What a study holds now. `trials` are in the order in which they were claimed; the front keeps the limits."""

    study: str
    storage: str  # without a password
    task: str
    task_version: str
    trials: list[Trial]
    front: list[Trial]
    points: dict[str, Trial]  # name -> trial of the front, see pareto.NAMES
    infeasible: dict[str, str] = field(default_factory=dict)  # trial id -> why it is not on the front
    adapters: bool = False  # whether small adapters were an objective too
    report: Path | None = None  # a page about it, where one was written
    reused: int = 0  # trials that were there before this call
    complete: bool = True  # False: the time ran out, or the space has no more configurations
    late: bool = False  # the time ran out

    def feasible(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.id not in self.infeasible]

    def to_json(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "storage": self.storage,
            "task": self.task,
            "task_version": self.task_version,
            "trials": [trial.to_json() for trial in self.trials],
            "front": [trial.id for trial in self.front],
            "points": {name: trial.id for name, trial in self.points.items()},
            "infeasible": self.infeasible,
            "adapters": self.adapters,
            "hypervolume": pareto.progress(self.feasible()),
            "reused": self.reused,
            "complete": self.complete,
        }


def sweep(
    run: Run,
    task: Task,
    settings: Settings,
    *,
    warm_start: Sequence[dict[str, Any]] = (),
    space: spaces.Space | None = None,
    limits: Limits = Limits(),
    storage: str | None = None,
    study: str | None = None,
    on_trial: Report | None = None,
    rule: StopRule | None = None,
    memory: Callable[[dict[str, Any], int], float] | None = None,
) -> Sweep:
    """Runs trials until the study has `settings.sweep.trials` of them or `settings.sweep.max_seconds` are over.

    run: trains one configuration and returns its Trial, whatever the configuration does; with several workers it must
    be picklable (a function of a module, or an instance of a class of one).
    warm_start: configurations to run first, best first, moved into the space.
    space: what is searched (default: the settings' methods and narrowing).
    storage: a SQLite or PostgreSQL URL (default: METAPEFT_SWEEP_STORAGE, else a database in METAPEFT_HOME/sweeps).
    study: its name (default: made of all that defines the study, so that the same command continues it).
    on_trial: called in this process after every trial, whichever worker ran it.
    rule: ends hopeless trials (status "stopped"); None: every trial gets its whole budget. memory: configuration
    and steps -> predicted peak in MiB, which decides what trains beside other sweeps' trials. Both picklable.

    One training at a time takes each of the machine's places (`metapeft.search.slots`), of all its sweeps together.

    The time is this call's own: no trial is started that by the others' median would end after `max_seconds`, except
    the first; what other workers are training is waited for, as long as there is time. Raises UserError on a wrong
    space or storage, MetapeftError when several trials in a row fail.
    """
    space = space or spaces.space(settings.sweep.methods, settings.sweep.space)
    name = study or study_name(task, settings, space, limits)
    url = _url(storage, name)
    deadline = time.monotonic() + settings.sweep.max_seconds if settings.sweep.max_seconds else None
    book = _Book(url, name, task, settings, space, limits)
    aids = _Aids(rule, memory)
    helpers: list[Any] = []
    try:
        book.open(warm_start)
        reused = len(book.finished())
        study_of = (url, name, task, settings, space, limits)
        helpers = _start_helpers(settings.sweep.workers - 1, run, deadline, aids, *study_of)
        known = {trial.id for trial in book.finished()}

        def ended() -> None:
            for trial in book.finished():
                if on_trial is not None and trial.id not in known:
                    known.add(trial.id)
                    on_trial(trial, len(known), max(settings.sweep.trials, len(known)))

        late = _work(book, run, deadline, aids, ended)
        for helper in helpers:
            helper.join()
        if helpers and not late:  # what a helper left behind when it was killed
            late = _work(book, run, deadline, aids, ended, first=False)
        ended()
        found = book.result(reused)
        found.late = late and not found.complete
        return found
    except json.JSONDecodeError as error:  # SQLite does not notice changed bytes of a text
        raise _damaged(url, error) from error
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()
        book.close()


def study_name(task: Task, settings: Settings, space: spaces.Space, limits: Limits = Limits()) -> str:
    """The same for all that may share trials: task version, metric, backbone, space, steps, seed, limits, strategy."""
    identity = _identity(task, settings, space, limits)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^a-z0-9]+', '-', Path(task.name).stem.lower()).strip('-') or 'task'}-{digest}"


def _identity(task: Task, settings: Settings, space: spaces.Space, limits: Limits) -> dict[str, Any]:
    """What makes a study what it is, as JSON."""
    from metapeft.backbones import identity as backbone

    chosen = settings.sweep
    identity = {
        "task": task.version,
        "backbone": backbone(settings.backbone),
        "steps": chosen.steps,
        "seed": settings.seed,
        "space": space.to_json(),
        "limits": asdict(limits),
        "sampler": chosen.sampler,
        "start": "warm" if chosen.warm else "cold",
        "stopping": chosen.stop,
        "adapters": chosen.adapters,
    }
    if task.metric == "macro_f1":  # of the others each kind of task has one: studies made without it stay valid
        identity["metric"] = task.metric
    return dict(json.loads(json.dumps(identity)))


def load(name: str, task: Task, settings: Settings, *, storage: str | None = None) -> Sweep:
    """A study as it is, without running anything. Raises UserError when there is none of that name."""
    url = _url(storage, name)
    book = _Book(url, name, task, settings)
    try:
        book.open(create=False)
        return book.result(len(book.finished()))
    except json.JSONDecodeError as error:
        raise _damaged(url, error) from error
    finally:
        book.close()


def _damaged(url: str, error: Exception) -> UserError:
    return UserError(
        f"the sweep storage {shown(url)} is damaged ({brief(error)}); put a copy back, or move it away to begin anew"
    )


@dataclass(frozen=True)
class _Aids:
    """What helps a worker: see `sweep`."""

    rule: StopRule | None = None
    memory: Callable[[dict[str, Any], int], float] | None = None


def _work(
    book: _Book, run: Run, deadline: float | None, aids: _Aids, ended: Callable[[], None], first: bool = True
) -> bool:
    """Claims, trains and records trials until there is nothing left to claim, now or when the other workers are done.

    first: its first trial is begun however late it is. True: there was no time for what is left.
    """
    import multiprocessing

    from metapeft.search.slots import Slots

    parent = multiprocessing.parent_process()
    slots = Slots(book.settings.sweep.workers)
    failures = 0
    awaited, told = frozenset[int](), False  # what others had in hand when there was nothing to claim
    while book.wants():
        usual = statistics.median([trial.seconds for trial in book.finished()] or [0.0])
        if deadline is not None and (awaited or not first) and time.monotonic() + usual >= deadline:
            return True
        if parent is not None and not parent.is_alive():
            return False  # a helper whose sweep was killed
        if awaited and book.others() == awaited:
            time.sleep(POLL_SECONDS)
            continue
        with slots.place(deadline) as place:
            if place is None:
                return True
            awaited = book.others()  # before the claim: a trial that is given back in between is seen
            claim = book.claim()
            if claim is None:
                if not awaited:
                    return False
                if not told and book.settings.sweep.workers == 1:  # else they are, as a rule, its own
                    told = True
                    say("sweep: waiting for what other workers are training")
                ended()
                continue
            first, awaited = False, frozenset()
            try:
                memory = aids.memory(claim.configuration, claim.steps) if aids.memory else None
                if not place.begin(memory, deadline):
                    book.release(claim)
                    return True
                repeats = claim.seed != book.settings.seed
                watch = None if aids.rule is None or repeats else book.watch(claim, aids)
                trial = run(claim.configuration, claim.seed, claim.steps, claim.id, watch)
            except Unfit as error:
                trial = book.failed(claim, str(error))
            except (UserError, OSError):  # a full disk, for example: no fault of the configuration
                book.release(claim)
                raise
            except Exception as error:  # the sweep outlives a broken trial, and keeps it
                trial = book.failed(claim, f"{type(error).__name__}: {error}")
            except BaseException:  # Ctrl-C: nobody's fault, so it may run again as if it never had
                book.release(claim)
                raise
            book.record(claim, trial)
        ended()
        failures = failures + 1 if trial.status == "failed" else 0
        if failures == FAILURES:
            raise MetapeftError(f"{FAILURES} trials failed in a row, the last one with: {trial.error}")
    return False


def _start_helpers(count: int, *arguments: Any) -> list[Any]:
    """The other workers, spawned: MLX hangs in forked processes."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    helpers = [context.Process(target=_help, args=arguments) for _ in range(count)]
    for helper in helpers:
        helper.start()
    return helpers


def _help(run: Run, deadline: float | None, aids: _Aids, *arguments: Any) -> None:
    """A helper process of `sweep`: one more worker on a study that is open already."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it gives its trial back
    book = _Book(*arguments)
    try:
        book.open()
        _work(book, run, deadline, aids, lambda: None, first=False)
    except (MetapeftError, KeyboardInterrupt):
        pass  # the sweep itself meets the same error, or ended this helper
    finally:
        book.close()


@dataclass(frozen=True)
class _Claim:
    """A trial that this worker has taken."""

    number: int
    id: str
    configuration: dict[str, Any]
    steps: int
    seed: int
    asked: Any  # optuna.Trial


def _patient(step: Callable[P, T]) -> Callable[P, T]:
    """A step of `_Book` that is made again when the database was away meanwhile: every step is safe to be cut."""

    @functools.wraps(step)
    def patient(*arguments: P.args, **options: P.kwargs) -> T:
        book: Any = arguments[0]
        until, told = time.monotonic() + PATIENCE, False
        while True:
            try:
                if book.lost:
                    book.renew()
                return step(*arguments, **options)
            except Exception as error:
                if not _passing(error):
                    raise
                book.lost = True
                if time.monotonic() >= until:
                    raise MetapeftError(
                        f"the sweep storage {shown(book.url)} has not answered for {PATIENCE:.0f} s ({_first(error)}); "
                        "start it and run the sweep again, which goes on with the trials that have ended"
                    ) from error
                if not told:
                    told = True
                    say(f"sweep: the storage {shown(book.url)} does not answer ({_first(error)}); waiting for it")
                time.sleep(RETRY_SECONDS)

    return patient


def _passing(error: BaseException | None) -> bool:
    """Whether a failure is of a database that is away or locked, and not of what was asked of it."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    while error is not None:
        if isinstance(error, DBAPIError):
            if "sqlite" in type(error.orig).__module__:
                return "locked" in str(error.orig) or "busy" in str(error.orig)
            return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
        error = error.__cause__ or error.__context__
    return False


def _first(error: BaseException) -> str:
    """The beginning of what a database says: of the cause, where a library only says that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return brief(str(getattr(error, "orig", None) or error).strip().partition("\n")[0])


class _Book:
    """The study's database: the only place that knows Optuna.

    Attributes of an Optuna trial: `id`, `configuration`, `steps`, `worker` (at the claim), `seed` (where it repeats a
    configuration), `record` (the Trial, when it ended), `copy_of` and `retry_of` (number of the trial that it replaces;
    the second where that one was begun), `void` (why it does not count: repeated, known, released).
    """

    def __init__(
        self,
        url: str,
        name: str,
        task: Task,
        settings: Settings,
        space: spaces.Space | None = None,
        limits: Limits = Limits(),
    ):
        self.url, self.name, self.task, self.settings = url, name, task, settings
        self.space = space or spaces.Space({})
        self.limits = limits
        self.adapters = settings.sweep.adapters
        self.worker = secrets.token_hex(8)
        self.lost = False  # the connection to the database, and with it the locks
        self.locks: Locks | None = None
        self.database: optuna.storages.RDBStorage | None = None
        self.study: optuna.Study | None = None

    def open(self, warm_start: Sequence[dict[str, Any]] = (), *, create: bool = True) -> None:
        """Opens the study, creating it where there is none, and queues the configurations that it has not seen."""
        import optuna
        import sqlalchemy

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = _sqlite_path(self.url)
        try:
            if path is not None:
                if not create and not path.exists():
                    raise self._missing()
                path.parent.mkdir(parents=True, exist_ok=True)
                self.locks = FileLocks(path.parent / f"{path.stem}.locks" / self.name)
            else:
                self.locks = DatabaseLocks(self.url, self.name)
            self.locks.hold(self.worker)
            with self.locks.exclusive():
                options = {"connect_args": {"timeout": 60}} if path is not None else {"pool_pre_ping": True}
                self.database = optuna.storages.RDBStorage(self.url, engine_kwargs=options)
                if path is not None:
                    sqlalchemy.event.listen(self.database.engine, "connect", _quicken)
                    self.database.engine.dispose()
                if create:
                    self._create()
                    self._enqueue(warm_start)
                else:
                    self._load()
        except ImportError as error:
            raise UserError(f"sweeps on PostgreSQL need its driver: pip install -e '.[postgres]' ({error})") from error
        except (
            sqlalchemy.exc.SQLAlchemyError,
            OSError,
            optuna.exceptions.StorageInternalError,
            AssertionError,
        ) as error:
            remedy = "check the URL" if path is None else "free space, or move the file away to begin anew"
            raise UserError(f"cannot open the sweep storage {shown(self.url)} ({_first(error)}); {remedy}") from error

    def renew(self) -> None:
        """After the database was away: takes the locks again. Raises SQLAlchemyError while it does not answer."""
        assert self.locks is not None and self.database is not None
        self.database.remove_session()
        self.database.engine.dispose()
        self.locks.renew()
        self.lost = False

    def _create(self) -> None:
        import optuna

        identity = _identity(self.task, self.settings, self.space, self.limits)
        directions = DIRECTIONS[: 4 if self.adapters else 3]
        self.study = optuna.create_study(
            study_name=self.name, storage=self.database, directions=directions, load_if_exists=True
        )
        stored = self.study.user_attrs.get("identity")
        if stored is None:
            self.study.set_user_attr("identity", identity)
        elif stored != identity:
            other = next(key for key in stored | identity if stored.get(key) != identity.get(key))
            raise UserError(f"sweep {self.name} was started with another {other}; give it another name, or none")

    def _load(self) -> None:
        import optuna

        assert self.database is not None
        try:
            self.study = optuna.load_study(study_name=self.name, storage=self.database)
        except KeyError as error:
            raise self._missing() from error
        identity = self.study.user_attrs.get("identity")
        if identity is None:  # a kill came right after it was created
            raise self._missing()
        self.limits, self.adapters = Limits(**identity["limits"]), identity["adapters"]

    def _missing(self) -> UserError:
        return UserError(f"there is no sweep {self.name} in {shown(self.url)}; run `metapeft sweep` first")

    def close(self) -> None:
        if self.database is not None:
            with suppress(Exception):  # there is nothing to lose in a session of a database that is away
                self.database.remove_session()
            self.database.engine.dispose()
        if self.locks is not None:
            self.locks.close()

    @_patient
    def wants(self) -> bool:
        """Whether trials are missing that nobody has begun (or that a dead worker left)."""
        from optuna.trial import TrialState

        counted = [t for t in self._all() if _counts(t) and _begun(t)]
        return len(counted) < self.settings.sweep.trials or any(t.state == TrialState.RUNNING for t in counted)

    @_patient
    def others(self) -> frozenset[int]:
        """The trials that other workers are training now, those who are alive."""
        with self._exclusive():
            return frozenset(t.number for t in self._all() if t.state.name == "RUNNING" and self._elsewhere(t))

    def _elsewhere(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether a running trial is in the hands of another worker that is alive.

        Who asks has none: its last claim was cut by a lost connection.
        """
        worker = trial.user_attrs.get("worker")
        assert self.locks is not None
        return worker not in (None, self.worker) and self.locks.held(worker)

    @_patient
    def claim(self) -> _Claim | None:
        """The next trial to run, or None when the study has enough or its space has nothing new."""
        with self._exclusive() as study:
            self._recover()
            tried = 0
            while sum(_counts(t) and _begun(t) for t in self._all()) < self.settings.sweep.trials:
                if not any(t.state.name == "WAITING" for t in self._all()) and (tried >= TRIES or self._searched()):
                    repeat = self._repeat() if tried < 2 * TRIES else None
                    if repeat is not None:
                        study.enqueue_trial(repeat[0], user_attrs=repeat[1])
                    elif tried >= TRIES:
                        return None
                # A sampler per trial, seeded by its place: a sweep that was interrupted goes on as if it had not been.
                study.sampler = self._sampler(self._place(), random=tried > TRIES // 2)
                asked = self._given_back() or study.ask()
                configuration = spaces.suggest(asked, self.space) | asked.user_attrs.get("extra", {})
                steps = int(configuration.pop("steps", self.settings.sweep.steps))
                configuration = full(configuration)
                seed = asked.user_attrs.get("seed", self.settings.seed)
                identity = self._id(configuration, seed, steps)
                others = [t for t in self._all() if t.number != asked.number and _counts(t)]
                if any(t.user_attrs.get("id") == identity for t in others):
                    self._void(asked, "known")
                    tried += 1
                    continue
                written = {"id": identity, "configuration": configuration, "steps": steps, "worker": self.worker}
                for key, value in written.items():  # the worker last: it makes the claim
                    asked.set_user_attr(key, value)
                return _Claim(asked.number, identity, configuration, steps, seed, asked)
            return None

    def _place(self) -> int:
        """How many trials the study has, each of them once, however often it was begun."""
        return sum(t.user_attrs.get("void") not in AGAIN for t in self._all())

    def _given_back(self) -> optuna.Trial | None:
        """The first of the queued trials that was begun before, which is next: Optuna itself takes it last."""
        import optuna

        waiting = (t for t in self._all() if t.state == optuna.trial.TrialState.WAITING and "copy_of" in t.user_attrs)
        found = next(waiting, None)
        if found is None:
            return None
        assert self.database is not None and self.study is not None
        self.database.set_trial_state_values(found._trial_id, optuna.trial.TrialState.RUNNING)
        return optuna.Trial(self.study, found._trial_id)

    def watch(self, claim: _Claim, aids: _Aids) -> Watch:
        """Asks the rule at every evaluation of a training, against what has ended until then."""
        assert aids.rule is not None
        rule = aids.rule

        def watched(event: dict[str, Any]) -> bool:
            if event.get("validation_score") is None or event["step"] >= event["steps"]:
                return False
            # The trainer's own curve: what was measured before a kill is in it.
            *before, last = event["curve"]
            curve = [*before, last | {"peak_memory_mb": event["peak_memory_mb"]}]
            return rule.hopeless(curve, claim.steps, self.feasible())

        return watched

    @_patient
    def record(self, claim: _Claim, trial: Trial) -> None:
        """Writes what became of a claimed trial. From here on it is never run again."""
        with self._exclusive():
            if self._frozen(claim.number).state.is_finished():
                return  # declared dead in the meantime (a lost connection): whoever repeats it will record it
            claim.asked.set_user_attr("record", trial.to_json())
            self._tell(claim.asked, trial)

    @_patient
    def release(self, claim: _Claim) -> None:
        """Gives a claimed trial back, to be run as if it had never been claimed."""
        with self._exclusive():
            frozen = self._frozen(claim.number)
            if frozen.state.is_finished():
                return  # cut after it was given back, or declared dead in the meantime
            self._requeue(frozen, attempt=False)
            self._void(claim.asked, "released")

    def failed(self, claim: _Claim, error: str) -> Trial:
        """The record of a trial that left none itself."""
        return Trial(
            id=claim.id,
            task=self.task.name,
            task_version=self.task.version,
            backbone=self.settings.backbone,
            method=claim.configuration["method"],
            configuration=claim.configuration,
            seed=claim.seed,
            budget=claim.steps,
            status="failed",
            error=error,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            train_examples=len(self.task.train),
        )

    @_patient
    def finished(self) -> list[Trial]:
        """The records, in the order of their claims."""
        return [Trial.from_json(t.user_attrs["record"]) for t in self._all() if t.state.is_finished() and _counts(t)]

    def feasible(self) -> list[Trial]:
        """The finished trials that ended well and keep the limits."""
        return [trial for trial in self.finished() if not self._broken(trial)]

    def result(self, reused: int) -> Sweep:
        trials = self.finished()
        infeasible = {t.id: why for t in trials if (why := ", ".join(self._broken(t)))}
        # What fails with one seed of several is not to be relied on.
        unreliable = {self._id(t.configuration, 0, t.budget): t.status for t in trials if pareto.objectives(t) is None}
        for trial in trials:
            status = unreliable.get(self._id(trial.configuration, 0, trial.budget))
            if status is not None and trial.id not in infeasible:
                infeasible[trial.id] = f"{status} with another seed"
        front = pareto.front((t for t in trials if t.id not in infeasible), self.adapters)
        return Sweep(
            study=self.name,
            storage=shown(self.url),
            task=self.task.name,
            task_version=self.task.version,
            trials=trials,
            front=front,
            points=pareto.named(front, self.adapters),
            infeasible=infeasible,
            adapters=self.adapters,
            reused=reused,
            complete=len(trials) >= self.settings.sweep.trials,
        )

    def _id(self, configuration: dict[str, Any], seed: int, steps: int) -> str:
        from metapeft.backbones import identity

        task, backbone = self.task, identity(self.settings.backbone)
        return trial_id(
            task.name, task.version, backbone, configuration, seed, steps, len(task.train), metric=task.metric
        )

    def _searched(self) -> bool:
        """Whether as many configurations were begun as the sweep searches; the rest of its trials repeats."""
        begun = [t for t in self._all() if _counts(t) and _begun(t) and "seed" not in t.user_attrs]
        return len(begun) >= max(1, self.settings.sweep.trials - self._kept())

    def _kept(self) -> int:
        """How many trials are kept for repetitions."""
        chosen = self.settings.sweep
        return chosen.repeats if chosen.repeats is not None else chosen.trials // 4 if chosen.trials >= 8 else 0

    def _repeat(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Optuna's parameters and attributes of the repetition that is worth most; None where none is.

        The configuration of the front with the fewest seeds; of several, one with a name.
        """
        if not self._kept():
            return None
        result = self.result(0)
        begun: dict[str, int] = {}
        for t in self._all():
            if _counts(t) and "id" in t.user_attrs:
                key = self._id(t.user_attrs["configuration"], 0, t.user_attrs["steps"])
                begun[key] = begun.get(key, 0) + 1
        best = [result.points[n] for n in REPEATED_FIRST if n in result.points] + result.front
        seeds = [begun.get(self._id(t.configuration, 0, t.budget), 1) for t in best]
        if not best or min(seeds) >= MOST_SEEDS:
            return None
        least = seeds.index(min(seeds))
        chosen = best[least]
        original = next(t for t in self._all() if t.user_attrs.get("id") == chosen.id)
        attributes = {"seed": self.settings.seed + seeds[least]}
        if "extra" in original.user_attrs:
            attributes["extra"] = original.user_attrs["extra"]
        return dict(original.params), attributes

    def _recover(self) -> None:
        """Trials whose worker is dead: tells those that left a record, queues the others again, once."""
        import optuna

        assert self.study is not None
        for trial in self._all():
            if trial.state != optuna.trial.TrialState.RUNNING or self._elsewhere(trial):
                continue
            worker = trial.user_attrs.get("worker")
            own = worker == self.worker
            asked = optuna.Trial(self.study, trial._trial_id)
            if "record" in trial.user_attrs:
                self._tell(asked, Trial.from_json(trial.user_attrs["record"]))
            elif worker is None and not ("fixed_params" in trial.system_attrs or "copy_of" in trial.user_attrs):
                self._void(asked, "repeated")  # half a proposal: the next one, of the same place, is the whole of it
            elif own or worker is None or "retry_of" not in trial.user_attrs:
                self._requeue(trial, attempt=not own and worker is not None)
                self._void(asked, "repeated")
            else:
                attributes = trial.user_attrs
                seed = attributes.get("seed", self.settings.seed)
                known = (attributes["id"], attributes["configuration"], attributes["steps"])
                claim = _Claim(trial.number, *known, seed, asked)
                record = self.failed(claim, LOST)
                asked.set_user_attr("record", record.to_json())
                self._tell(asked, record)

    def _requeue(self, trial: optuna.trial.FrozenTrial, *, attempt: bool) -> None:
        """Queues a trial's parameters again. attempt: it was tried, so that the copy is its last chance."""
        import optuna

        assert self.study is not None
        if any(t.user_attrs.get("copy_of") == trial.number for t in self._all()):
            return  # a kill came between the copy and the end of the original
        attributes = {k: v for k, v in trial.user_attrs.items() if k in ("extra", "seed", "retry_of")}
        attributes["copy_of"] = trial.number
        if attempt:
            attributes["retry_of"] = trial.number
        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=attributes,
                system_attrs={k: v for k, v in trial.system_attrs.items() if k == "fixed_params"},
            )
        )

    def _tell(self, asked: optuna.Trial, trial: Trial) -> None:
        """Values and constraints, in this order: constraints cannot be added to a finished trial."""
        assert self.study is not None
        known = asked.constraints
        for name, violation in self._broken(trial).items():
            if name not in known:
                asked.set_constraint(name, violation)
        bytes_ = (float(max(trial.adapter_bytes, 1)),) if self.adapters else ()
        worst = (0.0, max(trial.seconds, 1e-3), max(trial.peak_memory_mb, 1.0), *bytes_)
        values = pareto.objectives(trial, self.adapters) or worst
        self.study.tell(asked, values)

    def _void(self, asked: optuna.Trial, why: str) -> None:
        import optuna

        assert self.study is not None
        asked.set_user_attr("void", why)
        self.study.tell(asked, state=optuna.trial.TrialState.FAIL)

    def _broken(self, trial: Trial) -> dict[str, float]:
        """Constraint -> by how much it is broken, relative to the limit (without a result: by more than any)."""
        point = pareto.objectives(trial)
        if point is None:
            why = trial.status if trial.status != "ok" else "no finite score"
            return {why: STOPPED if trial.status == "stopped" else 10.0}
        pairs = (("seconds", point[1], self.limits.seconds), ("memory", point[2], self.limits.memory_mb))
        return {name: value / limit - 1 for name, value, limit in pairs if limit is not None and value > limit}

    def _sampler(self, place: int, random: bool = False) -> optuna.samplers.BaseSampler:
        """By default TPE after a third of the trials at random. Warm ones count as such: a warm sweep searches at once.

        random: where TPE repeats itself, because it is sure or the space is small.
        """
        import optuna

        seed = int.from_bytes(hashlib.sha256(f"{self.settings.seed}/{place}".encode()).digest()[:4], "big")
        kind = "random" if random else self.settings.sweep.sampler
        if kind == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        startup = min(10, max(3, self.settings.sweep.trials // 3))
        if kind == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=startup, seed=seed)
        if kind == "gp":
            try:
                import torch  # noqa: F401
            except ImportError as error:
                raise UserError(
                    "the gp sampler needs torch: pip install -e '.[gp]', or use sweep.sampler=tpe"
                ) from error
            return optuna.samplers.GPSampler(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)
        return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)

    def _enqueue(self, configurations: Sequence[dict[str, Any]]) -> None:
        assert self.study is not None
        queued = [t.system_attrs.get("fixed_params") for t in self._all()]
        for configuration in configurations:
            inside = spaces.project(configuration, self.space)
            if inside is None:
                continue
            parameters = spaces.encode(inside, self.space)
            searched = self.space.methods[inside["method"]]
            extra = {k: v for k, v in inside.items() if k not in searched and k != "method"}
            if parameters not in queued:
                queued.append(parameters)
                self.study.enqueue_trial(parameters, user_attrs={"extra": extra} if extra else None)

    @contextmanager
    def _exclusive(self) -> Iterator[optuna.Study]:
        assert self.locks is not None and self.study is not None
        with self.locks.exclusive():
            yield self.study

    def _all(self) -> list[optuna.trial.FrozenTrial]:
        assert self.study is not None
        return self.study.get_trials(deepcopy=False)

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        return next(t for t in self._all() if t.number == number)


def _counts(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial is one of the sweep's, begun or finished or waiting: not the shadow of a repeated one."""
    return "void" not in trial.user_attrs


def _begun(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.name != "WAITING"


def _quicken(connection: Any, _: Any) -> None:
    """A log instead of a synced journal: commits take a fifth of the time, and no kill or power cut breaks the file."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _url(storage: str | None, study: str) -> str:
    storage = storage or os.environ.get(STORAGE)
    if not storage:
        return f"sqlite:///{home() / 'sweeps' / f'{study}.db'}"
    if re.match(r"postgres(ql)?://", storage):
        return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", storage)
    if not re.match(r"(sqlite:///.|postgresql\+\w+://)", storage):
        raise UserError(
            f"cannot use the sweep storage {shown(storage)!r}; give sqlite:///FILE or postgresql://USER@HOST/NAME"
        )
    return storage


def _sqlite_path(url: str) -> Path | None:
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
