from __future__ import annotations

import numpy as np
import pytest

from metapeft.search import pareto
from metapeft.search.importance import LEAST, importance
from metapeft.training.configuration import full
from metapeft.training.trial import Trial
from tests.search import surrogate
from tests.search.test_pareto import trial


def tried(count: int, seed: int = 0) -> list[Trial]:
    """LoRA whose score depends on the rank alone; everything else is drawn at random."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        rank = int(random.choice([2, 8, 32]))
        chosen = full(
            {
                "method": "lora",
                "rank": rank,
                "learning_rate": float(10 ** random.uniform(-4, -2)),
                "dropout": float(random.uniform(0, 0.2)),
                "layers": int(random.choice([5, 10, 0])),
            }
        )
        value = {2: 0.5, 8: 0.7, 32: 0.9}[rank] + float(random.normal(0, 0.03))
        found.append(trial(str(number), value, 5, 5, configuration=chosen))
    return found


def test_what_decides_the_score_explains_it_and_the_rest_does_not() -> None:
    rows = {row.name: row for row in importance(tried(60))}
    assert rows["rank"].share > 0.9 and rows["rank"].best == "32" and rows["rank"].method == "lora"
    assert all(row.share < 0.15 for name, row in rows.items() if name != "rank")
    assert {"learning_rate", "dropout", "layers"} <= set(rows)


def test_chance_is_taken_out() -> None:
    """A hyperparameter that does nothing gets nothing on average, even with few trials."""
    shares = [
        row.share
        for seed in range(40)
        for row in importance(tried(12, seed))
        if row.name in ("learning_rate", "dropout")
    ]
    assert np.mean(shares) < 0.1


def test_the_method_is_judged_among_all_and_divergence_counts() -> None:
    known = [
        surrogate.train(full({"method": m, "learning_rate": r * f}))
        for m, r in surrogate.BEST_RATE.items()
        for f in (0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 30.0)
    ]
    rows = importance(known)
    assert rows[0].name == "method" and 0 <= rows[0].share <= 1 and rows[0].trials == len(known)
    rates = [row for row in rows if row.name == "learning_rate"]
    assert len(rates) == 5 and all(row.trials == 7 for row in rates)


@pytest.mark.parametrize("count", [0, 1, LEAST - 1])
def test_few_trials_say_nothing(count: int) -> None:
    assert importance(tried(count)) == []


def test_equal_scores_are_explained_by_nothing() -> None:
    same = [trial(t.id, 0.5, 5, 5, configuration=t.configuration) for t in tried(10)]
    assert all(row.share == 0 for row in importance(same))
    assert pareto.front(same)
