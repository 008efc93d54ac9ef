"""Profiles of incoming tasks against known ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp

from metapeft.monitoring.drift import LEAST_NEW, LENGTHS, Profiles, scaled, watch
from metapeft.profiling.profiles import SCALES
from tests.meta.made import profile

FEATURES = len(SCALES)


def tasks(count: int, seed: int, families: int = 20, shift: float = 0.0) -> tuple[np.ndarray, tuple[str, ...]]:
    random = np.random.default_rng(seed)
    middles = random.normal(size=(families, FEATURES)) * 0.5
    own = [f"f{i % families}" for i in range(count)]
    rows = np.array([middles[i % families] + random.normal(size=FEATURES) for i in range(count)])
    rows[:, 5] = rows[:, 5] > 0  # a feature that is yes or no
    rows[:, :4] += shift
    return rows, tuple(own)


def test_the_distances_are_kolmogorovs() -> None:
    known, _ = tasks(40, 0)
    new, _ = tasks(25, 1)
    found = Profiles(known, tuple("abcd" * 10)).ks(new)
    assert found == pytest.approx([ks_2samp(known[:, i], new[:, i]).statistic for i in range(FEATURES)])


def test_the_index_is_zero_for_the_same_and_grows_with_a_shift() -> None:
    known, families = tasks(40, 0)
    own = Profiles(known, families)
    assert own.psi(known) == pytest.approx(np.zeros(FEATURES), abs=1e-9)
    shifts = [own.psi(tasks(40, 1, shift=s)[0])[0] for s in (0.0, 1.0, 2.0)]
    assert shifts[0] < shifts[1] < shifts[2]


def test_a_shift_is_found_and_named_and_none_is_not() -> None:
    known, families = tasks(60, 0)
    own = Profiles(known, families)
    calm = np.vstack([tasks(20, seed)[0] for seed in range(10)])
    found, moved = watch(own, calm, range(len(calm)), 0.8)
    assert not found.alarms and found.fired is None and not moved
    shifted = np.vstack([calm[:40], tasks(40, 11, shift=2.0)[0]])
    found, moved = watch(own, shifted, range(len(shifted)), 0.8)
    assert found.fired is not None and 40 <= found.fired < 70
    assert set(moved) & set(list(SCALES)[:4]) and found.evidence >= 1 and found.chance < 0.1


def test_few_tasks_say_nothing() -> None:
    known, families = tasks(20, 0)
    found, _ = watch(Profiles(known, families), tasks(LEAST_NEW - 1, 1, shift=9.0)[0], range(LEAST_NEW - 1), 0.8)
    assert found.fired is None and found.evidence == 0.0


def test_a_profile_is_scaled_as_its_embedding() -> None:
    measured = profile()
    assert scaled(measured.features) == pytest.approx(measured.embedding)


def test_a_shift_of_one_feature_is_found_within_a_few_tasks() -> None:
    """Half of a window suffices: the shorter windows of means see it before it is most of the last 30 tasks."""
    known, families = tasks(60, 0)
    own, delays = Profiles(known, families), []
    for seed in range(8):
        calm, new = tasks(60, 10 + seed)[0], tasks(60, 30 + seed)[0]
        new[:, 7] += 2.0
        rows = np.vstack([calm, new])
        found, moved = watch(own, rows, range(len(rows)), 0.8)
        late = [a for a in found.alarms if a >= 60]
        delays.append(late[0] - 59)
        feature, shift = next(iter(moved.items()))
        assert feature == list(SCALES)[7] and 1.0 < shift < 3.0
        assert found.since is not None and found.fired is not None and found.fired + 1 - found.since in LENGTHS
    assert np.median(delays) <= 18 and max(delays) <= 25


def test_differences_of_means_are_in_standard_errors() -> None:
    known, families = tasks(4000, 0)
    own = Profiles(known, families)
    calm = np.array([own.away(tasks(10, 100 + seed, families=4000)[0])[0, 20:] for seed in range(60)])
    assert np.sqrt(np.mean(calm**2)) == pytest.approx(1.0, abs=0.1)
