"""The stop rule, on recorded full curves of a world whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from metapeft.search import pareto, stopping
from metapeft.search.stopping import StopRule, calibrated, collect, replay
from metapeft.training.configuration import full
from metapeft.training.trial import Score, Trial
from tests.search import surrogate


def recorded(tasks: int, each: int, noise: float = 0.01, seed: int = 0, informative: bool = True) -> list[Trial]:
    """Trials whose score rises to its end at a speed of its own; where not `informative`, to anywhere."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(tasks):
        task = surrogate.task(f"task {number}")
        for _ in range(each):
            method = str(random.choice(list(surrogate.BEST_RATE)))
            rate = surrogate.BEST_RATE[method] * 10 ** random.uniform(-1.5, 0.5)
            trial = surrogate.train(full({"method": method, "learning_rate": float(rate)}), where=task)
            if trial.status != "ok" or trial.validation is None:
                continue
            final, speed = trial.validation.value, random.uniform(1.5, 4)
            shown = final if informative else random.uniform(surrogate.UNTUNED, 0.95)
            curve: list[dict[str, Any]] = []
            for row in trial.curve:
                part = row["step"] / trial.budget
                level = surrogate.UNTUNED + (shown - surrogate.UNTUNED) * (1 - math.exp(-speed * 2 * part))
                score = min(1.0, max(0.0, level + random.normal(0, noise)))
                curve.append(row | {"validation_score": score, "validation_loss": 1.4 - score})
            found.append(replace(trial, curve=curve))
    return found


@pytest.fixture(scope="module")
def curves() -> list[Trial]:
    return recorded(16, 14)


@pytest.fixture(scope="module")
def rule(curves: list[Trial]) -> StopRule:
    return calibrated(curves)


def test_the_rule_states_its_false_stops_and_keeps_them_few(rule: StopRule) -> None:
    assert rule.alpha > 0 and rule.replayed.stops > 0
    assert rule.replayed.rate < rule.replayed.bound <= stopping.TARGET / stopping.HARDER and rule.replayed.saved > 0.1
    assert rule.replayed.rate == rule.replayed.false_stops / rule.replayed.stops


def test_what_was_promised_holds_on_tasks_never_seen(rule: StopRule) -> None:
    others = [replace(t, task_version=f"new {t.task_version}") for t in recorded(8, 14, seed=1)]
    found = replay(rule, others)
    assert found.stops > 20 and found.rate <= stopping.TARGET


def test_curves_that_say_nothing_stop_nothing_wrongly() -> None:
    rule = calibrated(recorded(8, 14, informative=False))
    assert rule.alpha == 0 or rule.replayed.bound <= stopping.TARGET / stopping.HARDER


@pytest.mark.parametrize("count", [0, 1, 5])
def test_without_enough_curves_nothing_is_stopped(count: int, curves: list[Trial]) -> None:
    rule = calibrated(curves[:count])
    assert rule.alpha == 0 and rule.replayed.stops == 0
    assert not rule.hopeless(rows(0.0), 40, curves)


def rows(score: float, seconds: float = 15.0, memory: float = 800.0, upto: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "step": 10 * (n + 1),
            "seconds": seconds * (n + 1) / 2,
            "validation_score": score,
            "validation_loss": 1.4 - score,
            "peak_memory_mb": memory,
        }
        for n in range(upto)
    ]


def test_hopeless_is_relative_to_what_is_as_cheap(rule: StopRule, curves: list[Trial]) -> None:
    finished = [t for t in curves if t.task_version == curves[0].task_version and pareto.objectives(t)]
    slow_and_bad = rows(0.5, seconds=1000.0, memory=5000.0)
    assert rule.hopeless(slow_and_bad, 40, finished)
    assert not rule.hopeless(slow_and_bad, 40, []), "nothing to be beaten by"
    assert not rule.hopeless(rows(0.5, seconds=0.01, memory=1.0), 40, finished), "nothing is as cheap"
    assert not rule.hopeless(rows(0.93, seconds=1000.0, memory=5000.0), 40, finished)
    assert not rule.hopeless(rows(0.5, 1000.0, 5000.0, upto=4), 40, finished), "at the end there is nothing to stop"
    assert not StopRule(rule.curves).hopeless(slow_and_bad, 40, finished)


def test_a_prediction_is_of_curves_that_stood_alike(rule: StopRule) -> None:
    predicted = rule.predict(rows(0.7), 40)
    assert predicted is not None and 0.6 < predicted[0] < 0.95
    assert rule.predict(rows(math.nan), 40) is None


def test_more_orders_of_the_same_trials_make_nothing_surer(rule: StopRule, curves: list[Trial]) -> None:
    once, often = replay(rule, curves, 1), replay(rule, curves, 8)
    assert often.stops > 6 * once.stops
    same = replace(once, stops=8 * once.stops, false_stops=8 * once.false_stops, orders=8)
    assert same.bound == pytest.approx(once.bound) and same.rate == once.rate
    assert often.bound > replace(often, orders=1).bound


def test_only_full_curves_are_collected(curves: list[Trial]) -> None:
    broken = [
        replace(curves[0], status="stopped"),
        replace(curves[0], status="diverged"),
        replace(curves[0], curve=[]),
        replace(curves[0], curve=curves[0].curve[-1:]),
        replace(curves[0], validation=Score("accuracy", math.nan, 0.1, 10, 1.0)),
    ]
    assert len(collect(broken).rise) == 0
    assert len(collect(curves[:1]).rise) == 3, "every evaluation before the end"
    assert replay(StopRule(collect(curves), 0.1), broken).trials == 0
