"""The Gaussian model of gains: an inverse, a proper posterior, task-centring, shrinkage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.meta import beliefs
from metapeft.meta.beliefs import Observation, expected, gain, posterior, score
from metapeft.meta.portfolio import portfolio
from metapeft.training.configuration import full

DEFAULTS = [full(c) for c in portfolio(30)]
unit = st.floats(0, 1)


@given(unit, unit)
def test_score_is_the_inverse_of_gain(tuned: float, untuned: float) -> None:
    found = gain(tuned, untuned)
    assert -1 <= found <= 1
    room = 1 - untuned if tuned >= untuned else untuned
    back = float(score(np.array(found), np.array(untuned)))
    assert back == pytest.approx(tuned, abs=1e-9 if room >= beliefs.FLOOR else beliefs.FLOOR)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), unit)
def test_scores_stay_in_range_and_in_order(gains: list[float], untuned: float) -> None:
    found = score(np.sort(gains), np.array(untuned))
    assert (found >= 0).all() and (found <= 1).all() and (np.diff(found) >= 0).all()


def test_without_evidence_the_portfolio_is_what_is_believed() -> None:
    mean, covariance = posterior("new", DEFAULTS, [])
    assert mean.tolist() == [expected(c) for c in DEFAULTS]
    assert (np.linalg.eigvalsh(covariance) > -1e-9).all()
    assert (np.sqrt(np.diag(covariance)) > 0.3).all()  # little is known


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 14), st.floats(-0.5, 1)), max_size=12))
def test_evidence_never_widens_and_stays_a_covariance(seen: list[tuple[str, int, float]]) -> None:
    observations = [Observation(task, DEFAULTS[i], value, 0.1) for task, i, value in seen]
    _, before = posterior("a", DEFAULTS, [])
    mean, after = posterior("a", DEFAULTS, observations)
    assert np.isfinite(mean).all()
    assert (np.diag(after) <= np.diag(before) + 1e-9).all()
    assert np.linalg.eigvalsh(after).min() > -1e-8


def test_a_result_moves_its_own_configuration_most_then_its_method() -> None:
    lora, near = full({"method": "lora", "learning_rate": 1e-3}), full({"method": "lora", "learning_rate": 8e-4})
    far, prefix = full({"method": "lora", "learning_rate": 3e-5}), full({"method": "prefix", "learning_rate": 5e-3})
    candidates = [lora, near, far, prefix]
    before, _ = posterior("t", candidates, [])
    after, covariance = posterior("t", candidates, [Observation("t", lora, 0.95, 0.03)])
    moved = after - before
    assert moved[0] > moved[1] > moved[2] > moved[3] > 0  # the last by the task's level alone
    assert after[0] == pytest.approx(0.95, abs=0.03) and np.sqrt(covariance[0, 0]) < 0.05
    elsewhere, _ = posterior("another", candidates, [Observation("t", lora, 0.95, 0.03)])
    assert 0 < elsewhere[0] - before[0] < 0.6 * moved[0]


def test_with_many_tasks_the_order_is_that_of_the_task_centred_averages() -> None:
    random = np.random.default_rng(0)
    levels = random.normal(0.4, 0.3, size=30)
    effects = np.linspace(0.2, -0.2, len(DEFAULTS))[random.permutation(len(DEFAULTS))]
    table = levels[:, None] + effects + random.normal(0, 0.05, size=(30, len(DEFAULTS)))
    observations = [
        Observation(f"task {t}", c, float(table[t, i]), 0.05) for t in range(30) for i, c in enumerate(DEFAULTS)
    ]
    mean, _ = posterior("new", DEFAULTS, observations)
    centred = (table - table.mean(axis=1, keepdims=True)).mean(axis=0)
    assert np.corrcoef(np.argsort(np.argsort(mean)), np.argsort(np.argsort(centred)))[0, 1] > 0.98
    assert mean.argmax() == centred.argmax()


def test_a_task_being_easy_is_not_a_merit_of_what_was_tried_on_it() -> None:
    good, bad = DEFAULTS[1], DEFAULTS[-1]
    observations = []
    for index in range(10):
        # Hard tasks were tried with both, easy ones with the worse one only: averages would prefer that.
        observations += [Observation(f"hard {index}", good, 0.3, 0.05), Observation(f"hard {index}", bad, 0.1, 0.05)]
        observations += [Observation(f"easy {index}", bad, 0.9, 0.05)]
    mean, _ = posterior("new", [good, bad], observations)
    assert mean[0] > mean[1] + 0.05


def test_little_evidence_moves_little() -> None:
    one = [Observation("t", DEFAULTS[0], -0.5, 0.2)]
    many = [Observation(f"t{i}", DEFAULTS[0], -0.5, 0.2) for i in range(20)]
    before, after, convinced = (posterior("new", DEFAULTS, seen)[0][0] for seen in ([], one, many))
    assert before > after > convinced
    assert before - after < 0.4 * (before - convinced)
