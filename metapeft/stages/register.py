"""register: records the whole pipeline in MLflow and puts the adapter into the registry.

Writes model.json: the registered name, version and alias, and the MLflow run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metapeft.peft import METHODS
from metapeft.progress import say
from metapeft.settings import Settings
from metapeft.stages.adapter import read_adapter
from metapeft.stages.files import current_sweep, read_task, read_trials
from metapeft.stages.stage import Stage, read_json, write_json
from metapeft.training.trial import Trial


@dataclass(frozen=True)
class Stored:
    """A record read back from a stage's output."""

    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.record


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Record and register. Doing it again for the same trial changes nothing."""
    from metapeft.meta import library
    from metapeft.meta.experience import Experience
    from metapeft.profiling import Profile
    from metapeft.stages.tracked import pipeline_run

    task = read_task(work / "version")
    profile = Stored(read_json(work / "profile" / "profile.json"))
    recommendation = Stored(read_json(work / "recommend" / "recommendation.json"))
    trial = Trial.from_json(read_json(work / "evaluate" / "trial.json"))
    read_adapter(work, trial)
    if trial.method in METHODS:
        Experience().append(trial)  # now with its score
        library.offer(work / "train" / "adapter", trial, task, Profile.from_json(profile.record))
    with pipeline_run(settings, work, task, trial.id) as tracker:
        tracker.log_task(task)
        tracker.log_profile(profile)
        tracker.log_recommendation(recommendation)
        if current_sweep(settings, work) is not None:
            for tried in read_trials(work / "sweep" / "trials.jsonl"):
                tracker.log_trial(tried, task)
        tracker.log_outcome(trial)
        tracker.log_decision(recommendation, profile, trial)
        tracker.set_tags({"selection": selection(settings, work, recommendation.record["basis"])})
        tracker.log_settings()
        if (work / "train" / "switching.json").exists():
            tracker.log_json(read_json(work / "train" / "switching.json"), "switching.json")
        registration = tracker.register(work / "train" / "adapter", trial, task, recommendation)
        say("register: {model} version {version}, {alias} ({reason})".format(**registration.to_json()))
        summary = registration.to_json() | {"run_id": tracker.run_id, "run_url": tracker.url()}
    write_json(out / "model.json", summary)
    return summary


def selection(settings: Settings, work: Path, basis: str) -> str:
    """How the configuration was chosen, as `metapeft compare --by selection` calls it."""
    on_the_way = " + switching" if settings.train.switch else ""
    if settings.train.method or settings.train.configuration:
        return f"asked for{on_the_way}"
    swept = " + sweep" if current_sweep(settings, work) is not None else ""
    return f"{basis}{swept}{on_the_way}"


def store(settings: Settings, work: Path) -> str:
    """The registry that the record is about: with another one, or a new one, the stage runs again.

    The experiment is made here: what the first run finds must be what a second one finds.
    """
    from metapeft.tracking.client import connect, experiment_id, failures, uri

    client = connect(settings.tracking)
    with failures(settings.tracking):
        made = client.get_experiment(experiment_id(client, settings.tracking)).creation_time
    return hashlib.sha256(f"{uri(settings.tracking)} {made}".encode()).hexdigest()


STAGE = Stage(
    "register",
    body,
    settings=("tracking", "backbone"),
    needs=("version", "profile", "recommend", "train", "evaluate"),
    uses=("sweep",),
    code=(
        "metapeft/meta",
        "metapeft/peft",
        "metapeft/profiling",
        "metapeft/tracking",
        "metapeft/stages/adapter.py",
        "metapeft/stages/files.py",
        "metapeft/stages/register.py",
        "metapeft/stages/tracked.py",
    ),
    outside=store,
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
