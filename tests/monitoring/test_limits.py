"""Statistics are what they are called, and limits keep the false alarms that they state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river.drift import PageHinkley

from metapeft.monitoring.limits import (
    HORIZON,
    LEAST,
    WINDOW,
    Limit,
    drawn,
    highest,
    page_hinkley,
    windowed,
    windows,
    worlds,
)  # fmt: skip


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.integers(0, 40), st.floats(0, 0.2))
def test_page_hinkley_is_rivers(values: list[float], weight: int, delta: float) -> None:
    theirs = PageHinkley(min_instances=1, delta=delta, threshold=float("inf"), alpha=1.0, mode="up")
    for _ in range(weight):
        theirs.update(0.0)
    seen = []
    for value in values:
        theirs.update(value)
        seen.append(theirs._sum_increase - theirs._min_increase)
    ours = page_hinkley(np.array([values]), weight, delta)[0]
    # river begins its minimum at the first value, ours at zero: without a past they differ until the first minimum.
    if weight:
        assert ours == pytest.approx(seen, abs=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=3 * WINDOW))
def test_windows_are_sums_of_the_last_values(values: list[float]) -> None:
    row = np.array(values)
    wanted = [row[max(0, i + 1 - WINDOW) : i + 1].sum() for i in range(len(row))]
    assert windowed(row) == pytest.approx(wanted, abs=1e-6)
    found = windows(row)
    assert np.isneginf(found[: LEAST - 1]).all()
    if len(row) >= LEAST:
        count = min(len(row), WINDOW)
        assert found[-1] == pytest.approx(wanted[-1] / count**0.5, abs=1e-6)


def test_worlds_weigh_families_and_draws_follow_them() -> None:
    random = np.random.default_rng(0)
    weights = worlds(["a", "a", "b", "c"], random, 50)
    assert weights.sum(axis=1) == pytest.approx(np.ones(50)) and np.allclose(weights[:, 0], weights[:, 1])
    counts = np.stack([(drawn(weights, 4000, random) == task).mean(axis=1) for task in range(4)], axis=1)
    assert np.abs(counts - weights).max() < 0.05


@pytest.mark.parametrize("statistic", [windows, lambda v: page_hinkley(v, 200, 0.2)])
def test_a_limit_keeps_its_rate_on_histories_it_has_not_seen(statistic) -> None:  # type: ignore[no-untyped-def]
    random = np.random.default_rng(1)
    limit = Limit(highest(statistic(random.normal(size=(600, HORIZON)))), per_thousand=0.2)
    fresh = statistic(random.normal(size=(600, HORIZON))).max(axis=1)
    share = float((fresh >= limit.value).mean())
    assert 0.12 < share < 0.28  # of histories of 1,000 decisions, one in five may have an alarm
    assert limit.chance(limit.value) == pytest.approx(0.2, abs=0.01) and limit.chance(1e9) < 0.002
