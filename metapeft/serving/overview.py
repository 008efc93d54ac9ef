"""What the page shows: the tasks that were measured, how good the advice was, decisions, the registry."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from metapeft.profiling.cache import read
from metapeft.profiling.profiles import Profile
from metapeft.settings import home
from metapeft.tracking.models import Model

if TYPE_CHECKING:
    from metapeft.serving.engine import Engine
    from metapeft.serving.registry import Registry
    from metapeft.serving.select import Selector


def overview(engine: Engine, registry: Registry, selector: Selector) -> dict[str, Any]:
    """JSON without NaN. Needs neither MLX nor the engine's thread."""
    found = registry.models
    return {
        "backbone": engine.name,
        "map": task_map(profiles(engine.backbone.content_id), {m.task: m.method for m in reversed(found)}),
        "reliability": reliability(found),
        "decisions": [decision(job) for job in selector.recent()],
        "models": [described(model, registry) for model in found],
        "deployments": [
            {"time": d.time, "task": d.task, "alias": d.alias, "version": d.version, "before": d.before}
            | {"outcome": d.outcome, "reason": d.reason}
            for d in list(registry.deployments)[-20:][::-1]
        ],
        "engine": {"waiting": engine.waiting, "rows": engine.flying, "adapters": len(engine.held)},
    }


def profiles(backbone_content: str) -> list[Profile]:
    """Of all tasks that were measured here for a backbone, one per task."""
    found: dict[str, Profile] = {}
    for path in sorted((home() / "profiles").glob("**/*.json")):
        record = read(path)
        try:
            profile = Profile.from_json(record) if record else None
        except Exception:  # of another version
            continue
        if profile is not None and profile.backbone_content == backbone_content:
            found[profile.task] = profile
    return list(found.values())


def task_map(known: list[Profile], methods: dict[str, str]) -> list[dict[str, Any]]:
    """Every task at its place in two dimensions: the first principal components of the embeddings."""
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
        {"task": p.task, "x": round(float(x), 4), "y": round(float(y), 4), "method": methods.get(p.task)}
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


def decision(job: Any) -> dict[str, Any]:
    """A request to select and the first of what was recommended."""
    first = ((job.recommendation or {}).get("recommendations") or [None])[0]
    return {
        "time": job.created,
        "task": (job.recommendation or {}).get("task") or job.request.get("task", "").rsplit("/", 1)[-1],
        "status": job.state,
        "basis": (job.recommendation or {}).get("basis"),
        "method": first["method"] if first else None,
        "score": first["score"] if first else None,
        "p_best": first["p_best"] if first else None,
    }


def described(model: Model, registry: Registry) -> dict[str, Any]:
    serving = [alias for (name, alias), v in registry.served.items() if name == model.name and v == model.version]
    numbers = {"score": model.score, "standard_error": model.standard_error, "untuned": model.untuned_score}
    return {
        "name": model.name,
        "task": model.task,
        "version": model.version,
        "aliases": sorted(serving),
        "method": model.method,
        "metric": model.metric,
        "created": model.created,
        **{k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()},
    }
