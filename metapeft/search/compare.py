"""Sweeps, strategies, methods and experiments side by side, from the trials that MLflow holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from metapeft.search import pareto
from metapeft.settings import Settings
from metapeft.tracking.client import connect, failures
from metapeft.tracking.compare import chosen
from metapeft.training.trial import Score, Trial

if TYPE_CHECKING:
    from mlflow.entities import Run

By = Literal["sweep", "strategy", "method", "experiment"]


def compare_by(settings: Settings, by: By, runs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per task and sweep (or strategy, …): what its trials came to, largest hypervolume first.

    `runs` as for `metapeft.tracking.compare.compare`. `score` is the best mean validation score with standard error,
    `test` that configuration's test score where it has one. Hypervolumes of one task have one reference, so they can be
    compared; those of different tasks cannot. Raises UserError for a name that is nothing of these.
    """
    client = connect(settings.tracking)
    found = chosen(settings, client, runs)
    with failures(settings.tracking):
        experiments = {e.experiment_id: e.name for e in client.search_experiments()}
        parents = {p: client.get_run(p) for p in {r.data.tags.get("mlflow.parentRunId") for r in found} if p}
    groups: dict[tuple[str, str, str], dict[str, Trial]] = {}
    for run in found:
        if "trial_id" not in run.data.tags:
            continue
        parent = parents.get(run.data.tags.get("mlflow.parentRunId", ""))
        if parent is None and by in ("sweep", "strategy"):
            continue  # a training by itself
        trial = _trial(run)
        place = (trial.task, trial.task_version, _group(by, run, parent, experiments))
        groups.setdefault(place, {})[trial.id] = trial
    worst: dict[tuple[str, str], pareto.Point] = {}
    for task in {place[:2] for place in groups}:
        worst[task] = pareto.reference(
            t for place, trials in groups.items() if place[:2] == task for t in trials.values()
        )
    rows = [_row(by, place, list(trials.values()), worst[place[:2]]) for place, trials in groups.items()]
    return sorted(rows, key=lambda r: (r["task"], r["task_version"], -r["hypervolume"], r["seconds"]))


def _group(by: By, run: Run, parent: Run | None, experiments: dict[str, str]) -> str:
    if by == "method":
        return str(run.data.tags["method"])
    if by == "experiment":
        return experiments.get(run.info.experiment_id, run.info.experiment_id)
    assert parent is not None
    fallback = parent.info.run_id[:8] if by == "sweep" else "not recorded"
    return str(parent.data.tags.get(by, fallback))


def _row(by: By, place: tuple[str, str, str], trials: list[Trial], worst: pareto.Point) -> dict[str, Any]:
    trials.sort(key=lambda t: t.started)
    names = pareto.named(trials)
    best = names.get("most accurate")
    score = pareto.judged(best) if best else None
    return {
        "task": place[0],
        "task_version": place[1],
        by: place[2],
        "trials": len(trials),
        "ok": sum(t.status == "ok" for t in trials),
        "stopped": sum(t.status == "stopped" for t in trials),
        "best": best.method if best else "",
        "metric": score.metric if score else "",
        "score": score.value if score else None,
        "score_standard_error": score.standard_error if score else None,
        "test": best.score.value if best and best.score else None,
        "untuned": next((t.untuned_score.value for t in trials if t.untuned_score), None),
        "front": len(pareto.front(trials)),
        "hypervolume": pareto.progress(trials, worst)[-1],
        "seconds": sum(t.seconds for t in trials),
    }


def _trial(run: Run) -> Trial:
    """What the comparison needs of a recorded trial; its configuration as MLflow's texts."""
    tags, metrics, params = run.data.tags, run.data.metrics, dict(run.data.params)
    configuration = {k: v for k, v in params.items() if k not in ("seed", "budget", "train_examples", "device")}
    return Trial(
        id=tags["trial_id"],
        task=tags.get("task", ""),
        task_version=tags.get("task_version", ""),
        backbone=tags.get("backbone", ""),
        method=tags.get("method", ""),
        configuration=configuration,
        seed=int(params.get("seed", 0)),
        budget=int(params.get("budget", 0)),
        status=tags.get("status", "failed"),  # type: ignore[arg-type]
        score=_score("score", tags, metrics),
        validation=_score("validation", tags, metrics),
        untuned_score=_score("untuned_score", tags, metrics),
        seconds=metrics.get("seconds", 0.0),
        train_seconds=metrics.get("train_seconds", 0.0),
        peak_memory_mb=metrics.get("peak_memory_mb", 0.0),
        adapter_bytes=int(metrics.get("adapter_bytes", 0)),
        started=f"{run.info.start_time:020d}",
    )


def _score(name: str, tags: dict[str, str], metrics: dict[str, float]) -> Score | None:
    if name not in metrics:
        return None
    error, loss = metrics.get(f"{name}_standard_error", math.nan), metrics.get(f"{name}_loss", math.nan)
    return Score(tags.get("metric", ""), metrics[name], error, int(metrics.get(f"{name}_examples", 0)), loss)
