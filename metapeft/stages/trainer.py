"""Training one configuration for the pipeline: what the sweep does many times and the final training once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.progress import say
from metapeft.settings import home
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from metapeft.training.session import Session

Event = Callable[[dict[str, Any]], None]


@dataclass
class Trainer:
    """Trains on one task and one backbone, loaded at the first call, and adds finished trials to the experience.

    Adapters go to METAPEFT_HOME/adapters/TRIAL_ID, where a training that was killed continues. A Trainer may be
    pickled: the loaded model and `on_event` stay behind.
    """

    backbone: str
    task: Task
    profile_version: str = ""
    test: bool = True  # whether the test split is scored
    on_event: Event | None = None
    _session: Session | None = field(default=None, repr=False)

    def session(self) -> Session:
        if self._session is None:
            from metapeft import backbones
            from metapeft.training.session import Session

            self._session = Session(backbones.load(self.backbone), self.task)
            say(f"device: {running_on()}")
        return self._session

    def __call__(self, configuration: dict[str, Any], seed: int, steps: int, trial_id: str) -> Trial:
        from metapeft.meta.experience import Experience
        from metapeft.training.trainer import run_trial

        trial = run_trial(
            self.session(),
            configuration,
            steps=steps,
            seed=seed,
            folder=home() / "adapters" / trial_id,
            progress=self.on_event,  # returns None: never asks to stop
            test=self.test,
        )
        trial.profile_version = self.profile_version
        if self.test or trial.status not in ("ok", "stopped"):
            Experience().append(trial)  # without a test score it is not finished: whoever scores it adds it
        return trial

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_session": None, "on_event": None}


def running_on() -> str:
    """The device and, on a CPU, the BLAS: what makes a run fast or slow."""
    from metapeft.runtime import describe

    about = describe()
    where = f"{about['device']} {about['device_name']}".strip()
    if not about["blas"]:
        return where
    slow = "" if about["fast_blas"] else "; this BLAS is some 30 times slower than it could be: see metapeft doctor"
    return f"{where}, {about['blas']}, {about['cores']} cores{slow}"
