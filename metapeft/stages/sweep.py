"""sweep: tries configurations on the task, the recommended ones first, and keeps the Pareto front.

Writes trials.jsonl, sweep.json (front, named points, why others are not on it), and for plots front.csv and curves.csv.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metapeft.progress import progress
from metapeft.settings import Settings
from metapeft.stages.files import read_task, write_csv, write_trials
from metapeft.stages.stage import Stage, read_json, write_json
from metapeft.stages.trainer import ENGINE, Trainer, engine_version

NAMED = {"accuracy": "most accurate", "balanced": "balanced", "speed": "fastest", "memory": "smallest"}
POINT = ["trial", "method", "score", "standard_error", "seconds", "peak_memory_mb", "front", "status"]
CURVE = ["trial", "method", "step", "seconds", "train_loss", "validation_loss", "validation_score"]


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Run or continue the task's study until it has its trials."""
    from metapeft.search import sweep as search
    from metapeft.search.pareto import judged
    from metapeft.stages.tracked import pipeline_run

    task = read_task(work / "version")
    recommended = read_json(work / "recommend" / "configurations.json")
    profile = read_json(work / "profile" / "profile.json")
    train = Trainer(settings.backbone, task, profile["version"])
    limits = search.Limits(settings.recommend.max_seconds, settings.recommend.max_memory_mb)
    space = _space(settings, train)
    study = f"{search.study_name(task, settings, space, limits)}-{engine_version()}"
    total = settings.sweep.trials
    with pipeline_run(settings, work, task) as tracker, progress("sweep", total) as advance:
        ended = 0

        def on_event(event: dict[str, Any]) -> None:
            advance(min(ended + event["step"] / event["steps"], total), f"trial {ended + 1} of {total}")

        def on_trial(trial: Any, done: int, will: int) -> None:
            nonlocal ended
            ended = done
            found = judged(trial)
            result = f"{found.metric} {found.value:.3f}" if found else trial.status
            advance(done, f"trial {done} of {will}: {trial.method} {result}, {trial.seconds:.0f} s", line=True)
            tracker.log_trial(trial, task)

        train.on_event = on_event
        result = search.sweep(
            train,
            task,
            settings,
            warm_start=warm_start(recommended, total),
            space=space,
            limits=limits,
            study=study,
            on_trial=on_trial,
        )
    for trial in result.trials:  # in DVC's cache a path of this machine would be a lie
        trial.adapter = ""
    record = result.to_json() | {"task": task.name, "backbone": settings.backbone, "engine": engine_version()}
    for volatile in ("trials", "storage", "reused"):  # the same trials must make the same files
        del record[volatile]
    write_trials(result.trials, out / "trials.jsonl")
    write_json(out / "sweep.json", record)
    front = {trial.id for trial in result.front}
    write_csv(out / "front.csv", [_point(trial, trial.id in front) for trial in result.trials if judged(trial)], POINT)
    rows = [{"trial": trial.id, "method": trial.method} | row for trial in result.trials for row in trial.curve]
    write_csv(out / "curves.csv", rows, CURVE)
    best = result.points.get(NAMED[settings.recommend.prefer])
    return {
        "trials": len(result.trials),
        "ok": sum(trial.status == "ok" for trial in result.trials),
        "reused": result.reused,
        "complete": result.complete,
        "best": best.method if best else None,
        "front": len(front),
    }


def warm_start(ranked: list[dict[str, Any]], trials: int) -> list[dict[str, Any]]:
    """The first configuration of every method, then the others, in the order given: a short sweep sees all methods.

    The recommended ones take at most half of the trials (or one per method): the rest is for what nobody expected.
    """
    first = list({c["method"]: c for c in reversed(ranked)}.values())
    ordered = [c for c in ranked if c in first] + [c for c in ranked if c not in first]
    return ordered[: max(len(first), trials // 2)]


def _space(settings: Settings, train: Any) -> Any:
    """The search space, fitted to the backbone."""
    from metapeft.peft.matrices import linear_layers
    from metapeft.search import spaces

    spaces.space(settings.sweep.methods, settings.sweep.space)  # a mistake in it is cheaper to find without the model
    session = train.session()
    modules = {path.rsplit(".", 1)[-1] for path in linear_layers(session.model)}
    return spaces.space(settings.sweep.methods, settings.sweep.space, depth=session.depth, modules=modules)


def _point(trial: Any, on_front: bool) -> dict[str, Any]:
    from metapeft.search.pareto import judged

    found = judged(trial)
    assert found is not None
    values = {"trial": trial.id, "method": trial.method, "score": found.value, "standard_error": found.standard_error}
    measured = {"seconds": trial.train_seconds or trial.seconds, "peak_memory_mb": trial.peak_memory_mb}
    return values | measured | {"front": int(on_front), "status": trial.status}


STAGE = Stage(
    "sweep",
    body,
    settings=("backbone", "seed", "sweep", "recommend"),
    needs=("version", "profile", "recommend/configurations.json"),
    code=("metapeft/search", *ENGINE, "metapeft/stages/sweep.py", "metapeft/stages/trainer.py"),
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
