"""A selection decision as one record: how the task looked, what was advised, what was chosen, what came of it.

It is the artifact `decision.json` of a pipeline's run: decisions can be learned from without this machine's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metapeft.training.trial import Trial


def advised(recommendation: Mapping[str, Any], trial: Trial) -> tuple[dict[str, Any] | None, bool]:
    """The recommendation's entry for a trial, and whether it is the very configuration.

    Otherwise it is the best one recommended of the same method; None where that method was not recommended.
    """
    same = [r for r in recommendation["recommendations"] if r["method"] == trial.method]
    for entry in same:
        if all(trial.configuration.get(k) == v for k, v in entry["configuration"].items()):
            return entry, True
    return (same[0] if same else None), False


def joined(recommendation: Mapping[str, Any], profile: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """`error`: measured score less the predicted one. `inside_80`, `inside_90`: whether the interval held it.

    These three are None where the configuration was not predicted, or has no score on the test split.
    """
    entry, exact = advised(recommendation, trial)
    score = trial.score
    expected = entry if exact else None

    def inside(name: str) -> bool | None:
        interval = expected.get(name) if expected else None
        return None if interval is None or score is None else bool(interval["low"] <= score.value <= interval["high"])

    return {
        "recommendation": recommendation.get("id"),
        "basis": recommendation["basis"],
        "meta_model": recommendation.get("model"),
        "task": trial.task,
        "task_version": trial.task_version,
        "backbone": trial.backbone,
        "embedding": profile["embedding"],
        "features": profile["features"],
        "advised": [
            {key: r[key] for key in ("rank", "method", "configuration", "score")}
            for r in recommendation["recommendations"]
        ],
        "chosen": {"method": trial.method, "configuration": trial.configuration, "rank": (expected or {}).get("rank")},
        "outcome": {
            "trial": trial.id,
            "status": trial.status,
            "metric": score.metric if score else None,
            "score": score.value if score else None,
            "standard_error": score.standard_error if score else None,
            "untuned": trial.untuned_score.value if trial.untuned_score else None,
            "seconds": trial.seconds,
            "peak_memory_mb": trial.peak_memory_mb,
        },
        "error": score.value - expected["score"]["mean"] if score and expected else None,
        "inside_80": inside("likely"),
        "inside_90": inside("score"),
    }
