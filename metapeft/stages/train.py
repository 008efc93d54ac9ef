"""train: trains the chosen configuration with the full budget.

The choice is the best of the sweep (by what the user prefers) where there was one, else the first recommended, with the
user's own values on top. Writes trial.json, curve.csv, the folder adapter and, where the method could be exchanged on
the way, switching.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.errors import MetapeftError, UserError
from metapeft.files import finite
from metapeft.progress import progress, say
from metapeft.settings import Settings, home
from metapeft.stages.files import CURVE, current_sweep, read_task, read_trials, write_csv
from metapeft.stages.stage import Stage, read_json, write_json
from metapeft.stages.trainer import Trainer, trial_lock
from metapeft.training.engine import SOURCES

if TYPE_CHECKING:
    from metapeft.switching.decide import Policy


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Train, and keep the best weights by validation."""
    from metapeft.meta.recommendation import short
    from metapeft.training.configuration import full

    task = read_task(work / "version")
    chosen, why = choose(settings, work)
    try:
        configuration = full(chosen)
    except UserError as error:
        if settings.train.method is not None or "method" in settings.train.configuration:
            raise
        raise UserError(f"{error} ({chosen['method']} is {why}; --method names another one)") from error
    steps = settings.train.steps
    given = ", ".join(f"{key}={value}" for key, value in short(chosen).items() if key != "method")
    say(f"train: {configuration['method']} with {given} ({why})")
    profile = read_json(work / "profile" / "profile.json")
    with progress("train" if settings.train.switch else f"train {configuration['method']}", steps) as advance:

        def on_event(event: dict[str, Any]) -> None:
            score = event.get("validation_score")
            method = f"{event['method']} " if "method" in event else ""
            note = f"{method}loss {event['train_loss']:.3f}" + (
                f", validation {score:.3f}" if score is not None else ""
            )
            done = event["step"] / event["steps"]
            advance(done * steps, f"step {event['step']} of {event['steps']}: {note}", line=score is not None)

        train = Trainer(settings.backbone, task, profile["version"], test=False, record=False, on_event=on_event)
        if settings.train.switch:
            trial, record = train.switching(configuration, settings.seed, steps, profile, policy(settings))
            write_json(out / "switching.json", finite(record.to_json()))
        else:
            trial = train.static(configuration, settings.seed, steps)
        with trial_lock(trial.id):
            if trial.status in ("ok", "stopped"):
                shutil.copytree(home() / "adapters" / trial.id, out / "adapter")
    if trial.status not in ("ok", "stopped"):
        raise MetapeftError(
            f"training {trial.method} ended as {trial.status} ({trial.error}); choose another configuration, for"
            f" example a lower learning_rate than {configuration['learning_rate']:g}"
        )
    methods = [leg.configuration["method"] for leg in record.legs] if settings.train.switch else [trial.method]
    trial.adapter = "adapter"
    write_json(out / "trial.json", finite(trial.to_json()))
    write_csv(out / "curve.csv", [{"trial": trial.id, "method": trial.method} | row for row in trial.curve], CURVE)
    validation = trial.validation.value if trial.validation else None
    return {
        "trial": trial.id,
        "method": trial.method,
        "chosen": why,
        "validation": validation,
        "seconds": trial.seconds,
        "methods": methods,
    }


def policy(settings: Settings) -> Policy:
    """How readily methods are exchanged."""
    from metapeft.switching.decide import Policy

    wanted = settings.train
    return Policy(wanted.confidence, wanted.switches, wanted.tolerance, wanted.looks)


def choose(settings: Settings, work: Path) -> tuple[dict[str, Any], str]:
    """A configuration and why it was chosen."""
    method, own = settings.train.method, dict(settings.train.configuration)
    method = own.pop("method", None) or method
    found = _swept(settings, work, method) or _recommended(work, method)
    if found is None:  # a method that the recommendation left out: its defaults
        found = {"method": method}, "asked for"
    return found[0] | own, found[1]


def _swept(settings: Settings, work: Path, method: str | None) -> tuple[dict[str, Any], str] | None:
    from metapeft.search.pareto import PREFERRED, named
    from metapeft.training.configuration import looks

    record = current_sweep(settings, work)
    if record is None:
        return None
    trials = read_trials(work / "sweep" / "trials.jsonl")
    usable = [t for t in trials if t.id not in record["infeasible"] and method in (None, t.method)]
    name = PREFERRED[settings.recommend.prefer]
    shown = record["points"].get(name) if method is None else None  # the very point that the sweep's table names
    best = next((t for t in usable if t.id == shown), None) or named(usable, record["adapters"]).get(name)
    if best is None:
        return None
    configuration = dict(best.configuration)
    if configuration.get("evaluations") == looks(best.budget):  # chosen for a short trial, not for this training
        del configuration["evaluations"]
    return configuration, f"{name} of {len(usable)} trials"


def _recommended(work: Path, method: str | None) -> tuple[dict[str, Any], str] | None:
    for rank, configuration in enumerate(read_json(work / "recommend" / "configurations.json"), start=1):
        if method in (None, configuration["method"]):
            return configuration, f"recommended, rank {rank}"
    return None


STAGE = Stage(
    "train",
    body,
    settings=("backbone", "seed", "train", "recommend.prefer"),
    needs=("version", "profile", "recommend/configurations.json"),
    uses=("sweep",),
    code=(
        "metapeft/meta",
        "metapeft/profiling",
        "metapeft/search/pareto.py",
        "metapeft/switching",
        *SOURCES,
        "metapeft/stages/files.py",
        "metapeft/stages/train.py",
        "metapeft/stages/trainer.py",
    ),
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
