"""`metapeft demo`: the whole job on a real task, small enough for a few minutes on two cores."""

from __future__ import annotations

import time
from typing import Any

from metapeft import api, stages
from metapeft.settings import load_settings
from metapeft.stages.stage import alone, read_json

SIZES: dict[str, Any] = {
    "data": {"max_train": 400, "max_validation": 80, "max_test": 300},
    "sweep": {"trials": 5, "steps": 20},  # one trial per method
    "train": {"steps": 80},
}


def run(task: str) -> dict[str, Any]:
    """Everything from the data to a registered adapter and a report; a second run finds every stage done."""
    begin = time.perf_counter()
    settings = load_settings(None, task=task, **SIZES)
    work = api.work_folder(settings)
    with alone(work):
        results = stages.run(stages.NAMES, settings, work)
        trial, swept = api.read_trial(work), api.read_sweep(work)
        recommendation = read_json(work / "recommend" / "recommendation.json")
    assert trial.score is not None and trial.untuned_score is not None
    model = results["register"].summary
    return {
        "task": trial.task,
        "recommendation": recommendation,
        "methods": best_per_method(swept.trials),
        "trial": trial.to_json(),
        "model": f"{model['model']} version {model['version']} ({model['alias']})",
        "report": str(work / "report" / "report.html"),
        "reused": [name for name, result in results.items() if result.cached],
        "seconds": time.perf_counter() - begin,
    }


def best_per_method(trials: list[Any]) -> list[dict[str, Any]]:
    """The best trial of each method, best validation score first, as JSON records; last, of methods of which none came
    to its end, the one that came furthest."""
    from metapeft.search.pareto import judged

    def order(trial: Any) -> tuple[Any, ...]:
        score = judged(trial)
        return trial.status != "ok", score is None, -score.value if score else 0.0, score.loss if score else 0.0

    best: dict[str, Any] = {}
    for trial in sorted(trials, key=order):
        best.setdefault(trial.method, trial)
    return [trial.to_json() for trial in best.values()]
