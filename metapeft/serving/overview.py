"""What the page shows: the tasks that were measured, how good the advice was, decisions, the registry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from metapeft.meta import decisions
from metapeft.meta.knowledge import knowledge
from metapeft.profiling.profiles import Profile, every_profile
from metapeft.tracking.models import Model
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from metapeft.serving.engine import Engine
    from metapeft.serving.registry import Registry
    from metapeft.serving.select import Selector


def overview(engine: Engine, registry: Registry, selector: Selector) -> dict[str, Any]:
    """JSON without NaN. Needs neither MLX nor the engine's thread."""
    found = registry.models
    trials = [trial for trial in knowledge().trials if trial.backbone == engine.backbone.id]
    registered = {m.task: m.method for m in reversed(found)}
    return {
        "backbone": engine.name,
        "map": task_map(profiles(engine.backbone.content_id), registered, best_methods(trials)),
        "reliability": reliability(found),
        "decisions": [*unfinished(selector), *decided(engine.backbone.id, trials)],
        "models": [described(model, registry) for model in found],
        "deployments": [
            {"time": d.time, "task": d.task, "alias": d.alias, "version": d.version, "before": d.before}
            | {"outcome": d.outcome, "reason": d.reason}
            for d in list(registry.deployments)[-20:][::-1]
        ],
        "engine": {"waiting": engine.waiting, "rows": engine.flying, "adapters": len(engine.held)},
    }


def profiles(backbone_content: str) -> list[Profile]:
    """Of all tasks that were measured for a backbone, here or for the experience that ships; one per task."""
    known = [profile for profile in every_profile().values() if profile.backbone_content == backbone_content]
    return list({profile.task: profile for profile in known}.values())


def best_methods(trials: Sequence[Trial]) -> dict[str, tuple[str, float]]:
    """Task -> the method with the best score in the experience, and that score."""
    found: dict[str, tuple[str, float]] = {}
    for trial in trials:
        value = trial.score.value if trial.score is not None else math.nan
        if math.isfinite(value) and value > found.get(trial.task, ("", -math.inf))[1]:
            found[trial.task] = (trial.method, value)
    return found


def task_map(
    known: list[Profile], registered: dict[str, str], best: dict[str, tuple[str, float]]
) -> list[dict[str, Any]]:
    """Every task at its place in two dimensions: the first principal components of the embeddings.

    registered: the method of each task's latest adapter. best: what the experience knows.
    """
    known = [p for p in known if p.names == known[0].names] if known else []
    if not known:
        return []
    points = np.array([p.embedding for p in known], dtype=float)
    points = np.nan_to_num(points - points.mean(axis=0))
    if len(known) > 1:
        left, size, _ = np.linalg.svd(points, full_matrices=False)
        places = left[:, :2] * size[:2]
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    else:
        places = np.zeros((1, 2))
    signs = np.where(places[np.abs(places).argmax(axis=0), range(2)] < 0, -1, 1)  # SVD leaves them open
    return [
        {"task": p.task, "x": round(float(x), 4), "y": round(float(y), 4)}
        | {"method": registered.get(p.task), "best": best.get(p.task, (None, None))[0]}
        | {"best_score": best.get(p.task, (None, None))[1]}
        for p, (x, y) in zip(known, places * signs, strict=True)
    ]


def reliability(found: tuple[Model, ...]) -> dict[str, Any]:
    """Predicted against measured score, for registered adapters whose configuration had been recommended."""
    points: list[dict[str, Any]] = []
    for model in found:
        expected = (model.expected or {}).get("score") or {}
        values = [expected.get(key) for key in ("mean", "low", "high", "level")]
        if all(isinstance(v, int | float) and math.isfinite(v) for v in [*values, model.score]):
            mean, low, high, level = (float(v) for v in values if v is not None)
            points.append(
                {
                    "task": model.task,
                    "method": model.method,
                    "predicted": mean,
                    "low": low,
                    "high": high,
                    "level": level,
                    "measured": model.score,
                    "inside": low <= model.score <= high,
                }
            )
    inside = sum(bool(p["inside"]) for p in points)
    return {
        "points": points,
        "inside": inside,
        "count": len(points),
        "level": points[0]["level"] if points else None,
        "mean_error": float(np.mean([abs(p["predicted"] - p["measured"]) for p in points])) if points else None,
    }


def unfinished(selector: Selector) -> list[dict[str, Any]]:
    """Datasets that wait, are being measured, or could not be."""
    return [
        {"time": job.created, "task": job.request.get("task", "").rsplit("/", 1)[-1], "status": job.state}
        for job in selector.recent()
        if job.state != "done"
    ]


def decided(backbone: str, trials: Sequence[Trial], count: int = 20) -> list[dict[str, Any]]:
    """The latest recommendations, whoever asked: the first choice, and what became of it.

    tried: later trials of recommended configurations. best: the best later score. regret: that less the first choice's.
    """
    entries = [entry for entry in decisions.read() if entry["backbone"] == backbone]
    outcomes = {outcome.recommendation: outcome for outcome in decisions.outcomes(trials, entries)}
    found = []
    for entry in entries[-count:][::-1]:
        first, outcome = next(iter(entry["recommendations"]), None), outcomes[entry["id"]]
        found.append(
            {
                "time": datetime.fromisoformat(entry["at"]).timestamp(),
                "task": entry["task"],
                "status": "done",
                "basis": entry["basis"],
                "method": first["method"] if first else None,
                "score": first["score"] if first else None,
                "p_best": first["p_best"] if first else None,
                "tried": len(outcome.followed),
                "best": outcome.best,
                "regret": outcome.regret,
            }
        )
    return found


def described(model: Model, registry: Registry) -> dict[str, Any]:
    numbers = {"score": model.score, "standard_error": model.standard_error, "untuned": model.untuned_score}
    return {
        "name": model.name,
        "task": model.task,
        "version": model.version,
        "aliases": registry.aliases(model),
        "method": model.method,
        "metric": model.metric,
        "created": model.created,
        **{k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()},
    }
