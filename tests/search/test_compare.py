"""Sweeps side by side, from a real MLflow database."""

from __future__ import annotations

import pytest

from metapeft import tracking
from metapeft.errors import UserError
from metapeft.search import pareto
from metapeft.search.compare import compare_by
from metapeft.settings import load_settings
from metapeft.tracking.compare import compare
from metapeft.training.configuration import full
from tests.search import surrogate

TASK = surrogate.task()


def test_sweeps_strategies_methods_and_experiments_side_by_side() -> None:
    settings = load_settings()
    good = [surrogate.train(full({"method": m, "learning_rate": r})) for m, r in surrogate.BEST_RATE.items()]
    poor = [surrogate.train(full({"method": m, "learning_rate": r / 9})) for m, r in surrogate.BEST_RATE.items()]
    poor.append(surrogate.train(full({"method": "lora", "learning_rate": 1.0})))
    good.append(surrogate.train(good[0].configuration, seed=1))
    for trial in (*good, *poor):
        trial.score = None  # a sweep leaves the test split alone
    for name, strategy, trials in (("a", "warm tpe", good), ("b", "cold random", poor)):
        with tracking.run(settings, TASK.name, {"sweep": name, "strategy": strategy}) as run:
            for trial in trials:
                run.log_trial(trial, TASK)

    rows = compare_by(settings, "sweep")
    assert [row["sweep"] for row in rows] == ["a", "b"] and rows[0]["hypervolume"] > rows[1]["hypervolume"] > 0
    assert [(row["trials"], row["ok"]) for row in rows] == [(6, 6), (6, 5)]
    best = pareto.named(good)["most accurate"]
    assert best.validation is not None
    assert rows[0]["best"] == "lora" and rows[0]["score"] == pytest.approx(best.validation.value), (
        "the mean of two seeds"
    )
    assert rows[0]["metric"] == "accuracy" and rows[0]["test"] is None
    assert rows[0]["seconds"] == pytest.approx(sum(t.seconds for t in good))
    worst = pareto.reference([*good, *poor])
    assert rows[1]["hypervolume"] == pytest.approx(pareto.progress(poor, worst)[-1])

    assert [row["strategy"] for row in compare_by(settings, "strategy")] == ["warm tpe", "cold random"]
    assert {row["method"]: row["trials"] for row in compare_by(settings, "method")} == {
        method: 4 if method == "lora" else 2 for method in surrogate.BEST_RATE
    }
    (row,) = compare_by(settings, "experiment")
    assert row["experiment"] == "metapeft" and row["trials"] == 12
    assert compare_by(settings, "sweep", ["metapeft"]) == rows
    with pytest.raises(UserError, match="'nothing' is no run"):
        compare_by(settings, "sweep", ["nothing"])

    by_trial = compare(settings)
    assert len(by_trial) == 12 and by_trial[0]["validation"] >= by_trial[1]["validation"]
    assert compare_by(load_settings(tracking={"experiment": "other"}), "sweep") == []
