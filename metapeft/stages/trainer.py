"""Training one configuration for the pipeline: what the sweep does many times and the final training once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.progress import say
from metapeft.settings import home
from metapeft.stages.stage import write_json
from metapeft.training.engine import engine
from metapeft.training.trial import Score, Trial

if TYPE_CHECKING:
    from metapeft.switching.decide import Policy
    from metapeft.switching.record import Record
    from metapeft.training.session import Session

Event = Callable[[dict[str, Any]], None]


@dataclass
class Trainer:
    """Trains on one task and one backbone, loaded at the first call, and adds finished trials to the experience.

    Adapters go to METAPEFT_HOME/adapters/TRIAL_ID, where a training that was killed continues. A Trainer may be
    pickled: the loaded model and `on_event` stay behind. test: whether the test split is scored; without it the
    experience gets the validation score. record: False where whoever scores the trial adds it to the experience.
    """

    backbone: str
    task: Task
    profile_version: str = ""
    test: bool = True
    record: bool = True
    on_event: Event | None = None
    _session: Session | None = field(default=None, repr=False)

    def session(self) -> Session:
        if self._session is None:
            from metapeft import backbones
            from metapeft.training.session import Session

            self._session = Session(backbones.load(self.backbone), self.task)
            say(f"device: {running_on()}")
        return self._session

    def untuned(self) -> Score:
        """The backbone's own test score, measured once per data, backbone and engine: see METAPEFT_HOME/untuned."""
        from metapeft.training.evaluation import untuned

        session = self.session()
        if "test" not in session.untuned:
            known = self._untuned_file()
            try:
                session.untuned["test"] = Score(**json.loads(known.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError, RecursionError):
                write_json(known, asdict(untuned(session, "test")))
        return session.untuned["test"]

    def _untuned_file(self) -> Path:
        backbone = self.session().backbone.content_id
        return home() / "untuned" / f"{self.task.version}-{self.task.metric}-{backbone}-{engine()}.json"

    def __call__(
        self,
        configuration: dict[str, Any],
        seed: int,
        steps: int,
        trial_id: str,
        watch: Callable[[dict[str, Any]], bool] | None = None,
    ) -> Trial:
        """watch: gets every event of the training, and stops it by returning True."""
        from metapeft.meta.experience import Experience
        from metapeft.training.trainer import run_trial

        before = self.untuned()

        def progress(event: dict[str, Any]) -> bool:
            if self.on_event is not None:
                self.on_event(event)
            return watch is not None and watch(event)

        with trial_lock(trial_id):
            trial = run_trial(
                self.session(),
                configuration,
                steps=steps,
                seed=seed,
                folder=home() / "adapters" / trial_id,
                progress=progress,
                test=self.test,
            )
        trial.profile_version = self.profile_version
        trial.untuned_score = before
        if self.record or trial.status not in ("ok", "stopped"):
            Experience().append(trial)
        return trial

    def static(self, configuration: dict[str, Any], seed: int, steps: int) -> Trial:
        """One configuration (all hyperparameters) to its end."""
        from metapeft.backbones import identity
        from metapeft.training.trial import trial_id

        task, backbone = self.task, identity(self.backbone)
        count = len(task.train)
        known_as = trial_id(task.name, task.version, backbone, configuration, seed, steps, count, metric=task.metric)
        return self(configuration, seed, steps, known_as)

    def switching(
        self, configuration: dict[str, Any], seed: int, steps: int, profile: dict[str, Any], policy: Policy
    ) -> tuple[Trial, Record]:
        """A training that begins with a configuration and may exchange it, within what `steps` of it cost.

        profile: the task's, as JSON. The trial belongs to no method, so the experience does not get it. Decisions
        know the untuned backbone's validation score: test answers only measure what came of them.
        """
        from metapeft.profiling import Profile
        from metapeft.switching import run
        from metapeft.switching.advice import Advice, Basis, advice
        from metapeft.training.evaluation import untuned

        self.untuned()  # of the test split, for the record
        session = self.session()
        before = untuned(session, "validation").value

        def ask(basis: Basis | None) -> Advice:
            return advice(self.task, Profile.from_json(profile), configuration, steps, before, basis=basis)

        identity = run.identity(session, configuration, steps, seed, policy)
        with trial_lock(identity):
            trial, record = run.train(
                session,
                configuration,
                ask,
                steps=steps,
                folder=home() / "adapters" / identity,
                policy=policy,
                seed=seed,
                progress=lambda event: self.on_event(event) if self.on_event else None,  # type: ignore[func-returns-value]
                test=False,
            )
        trial.profile_version = self.profile_version
        return trial, record

    def tested(self, trial: Trial) -> Trial:
        """Scores a finished trial on the test split, where its adapter is still there, and tells the experience."""
        from metapeft.meta.experience import Experience
        from metapeft.peft import adapters
        from metapeft.training.evaluation import evaluate

        folder = home() / "adapters" / trial.id
        if trial.score is not None or not folder.is_dir():
            return trial
        session = self.session()
        with trial_lock(trial.id):
            adapter = adapters.load(folder, session.model)
        adapter.attach(session.model)
        try:
            trial.score = evaluate(session, adapter, "test")
        finally:
            adapter.detach(session.model)
        Experience().append(trial)
        return trial

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_session": None, "on_event": None}


def trial_lock(trial_id: str) -> Any:
    """Held by whoever trains this trial or reads its adapter: two pipelines may want the same one at the same time."""
    from filelock import FileLock

    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"trial-{trial_id}.lock", is_singleton=True)  # one process may take it twice


def running_on() -> str:
    """The device and, on a CPU, the BLAS: what makes a run fast or slow."""
    from metapeft.runtime import describe

    about = describe()
    where = f"{about['device']} {about['device_name']}".strip()
    if not about["blas"]:
        return where
    slow = "" if about["fast_blas"] else "; this BLAS is some 30 times slower than it could be: see metapeft doctor"
    return f"{where}, {about['blas']}, {about['cores']} cores{slow}"
