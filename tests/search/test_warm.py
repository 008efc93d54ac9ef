from __future__ import annotations

from metapeft.search.warm import MOST_EACH, nearest_fronts, warm_start
from metapeft.training.configuration import full
from tests.search import surrogate
from tests.search.test_pareto import trial

RECOMMENDED = [
    {"method": "lora", "learning_rate": 1e-3},
    {"method": "lora", "learning_rate": 3e-4},
    {"method": "prefix", "learning_rate": 1e-2},
    {"method": "prompt", "learning_rate": 1e-2},
    {"method": "prefix", "learning_rate": 2e-3},
]
NEAREST = [{"method": "p_tuning", "learning_rate": 1e-3}, full({"method": "lora", "learning_rate": 1e-3})]


def test_every_method_first_then_by_turns() -> None:
    start = warm_start(RECOMMENDED[:3], RECOMMENDED, NEAREST, 20)
    assert start == [RECOMMENDED[0], RECOMMENDED[2], RECOMMENDED[3], NEAREST[0], RECOMMENDED[1], RECOMMENDED[4]]


def test_at_most_half_of_the_trials_or_one_per_method() -> None:
    assert len(warm_start(RECOMMENDED[:3], RECOMMENDED, NEAREST, 8)) == 4
    assert warm_start(RECOMMENDED[:3], RECOMMENDED, NEAREST, 1) == [RECOMMENDED[0], RECOMMENDED[2], RECOMMENDED[3]]
    assert warm_start([], [], NEAREST, 8) == NEAREST
    assert warm_start([], [], [], 8) == []


def test_fronts_of_the_most_similar_tasks_by_turns() -> None:
    tasks = [surrogate.task(name) for name in ("flowers", "weeds", "trees", "ferns")]
    rates = (0.3, 1.0, 1.5)
    known = [
        surrogate.train(full({"method": method, "learning_rate": rate * factor}), where=task)
        for task in tasks
        for method, rate in surrogate.BEST_RATE.items()
        for factor in rates
    ]
    found = nearest_fronts(known, ["weeds", "nowhere", "flowers", "trees", "ferns"])
    assert found[0] == full({"method": "lora", "learning_rate": surrogate.BEST_RATE["lora"]}), "weeds' most accurate"
    assert len(found) <= 2 * MOST_EACH, "three tasks are asked, of which one is unknown"
    assert nearest_fronts(known, []) == [] and nearest_fronts([], ["weeds"]) == []


def test_the_largest_of_a_tasks_sizes_counts() -> None:
    small = trial("small", 0.9, 1, 1, task="a", task_version="s", train_examples=64)
    large = trial("large", 0.8, 5, 5, task="a", task_version="l", train_examples=600)
    large.configuration = full({"method": "prompt"})
    assert nearest_fronts([small, large], ["a"]) == [large.configuration]


def test_a_longer_sweep_begins_with_the_best_and_goes_on_with_what_widens_the_front() -> None:
    def predict(configuration: dict[str, object]) -> tuple[float, float, float]:
        _, score, seconds, memory = surrogate.truth(full(configuration))
        return score, seconds, memory

    first = [RECOMMENDED[3], RECOMMENDED[0], RECOMMENDED[2]]
    start = warm_start(first, RECOMMENDED, NEAREST, 20, predict)
    assert start[:3] == first and 3 < len(start) <= 10
    assert len({repr(full(c)) for c in start}) == len(start), "none twice"
    fourth = full(start[3])
    assert predict(fourth)[1] < min(predict(full(c))[1] for c in start[:3]), "the cheap end of the front"
    assert warm_start(first, RECOMMENDED, NEAREST, 3, predict) == warm_start(first, RECOMMENDED, NEAREST, 3)
    assert warm_start(first, RECOMMENDED, NEAREST, 4, predict) == first
    assert warm_start(RECOMMENDED[:3], RECOMMENDED, NEAREST, 12, lambda _: None) == warm_start(
        RECOMMENDED[:3], RECOMMENDED, NEAREST, 12
    )
