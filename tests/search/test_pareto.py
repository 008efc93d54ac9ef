from __future__ import annotations

import itertools
import math
import shlex

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume  # private: the reason why we have our own

from metapeft.search import pareto, spaces
from metapeft.training.configuration import full
from metapeft.training.trial import Score, Trial


def trial(name: str, value: float, seconds: float, memory: float, /, **changes: object) -> Trial:
    made = Trial(
        id=name,
        task="t",
        task_version="v",
        backbone="b",
        method="lora",
        configuration=full({"method": "lora"}),
        seed=0,
        budget=40,
        status="ok",
        validation=Score("accuracy", value, 0.02, 150, 1 - value if math.isfinite(value) else math.nan),
        seconds=seconds * 1.5,
        train_seconds=seconds,
        peak_memory_mb=memory,
    )
    for key, changed in changes.items():
        setattr(made, key, changed)
    return made


grid = st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(1, 6))


@given(st.lists(grid, max_size=25))
@settings(max_examples=200, deadline=None)
def test_front_is_what_nothing_dominates(points: list[tuple[int, int, int]]) -> None:
    trials = [trial(str(i), s / 6, t, m) for i, (s, t, m) in enumerate(points)]
    kept = {int(t.id) for t in pareto.front(trials)}
    for i, p in enumerate(points):
        beaten = any(q != p and q[0] >= p[0] and q[1] <= p[1] and q[2] <= p[2] for j, q in enumerate(points) if j != i)
        assert (i in kept) == (not beaten)


def test_equal_points_are_all_kept_and_the_best_score_comes_first() -> None:
    trials = [trial("b", 0.8, 5, 5), trial("a", 0.8, 5, 5), trial("c", 0.9, 6, 6), trial("worse", 0.7, 5, 6)]
    assert [t.id for t in pareto.front(trials)] == ["c", "a", "b"]


@pytest.mark.parametrize(
    "broken",
    [
        {"status": "diverged"},
        {"status": "stopped"},
        {"validation": None},
        {"peak_memory_mb": math.inf},
        {"validation": Score("accuracy", math.nan, 0.1, 10, 1.0)},
    ],
)
def test_what_did_not_end_well_is_left_out(broken: dict[str, object]) -> None:
    good, bad = trial("good", 0.5, 5, 5), trial("bad", 0.9, 1, 1, **broken)
    assert pareto.front([bad, good]) == [good]
    assert pareto.objectives(bad) is None


def test_the_test_split_is_judged_only_where_no_validation_ran() -> None:
    test = Score("accuracy", 0.7, 0.02, 300, 0.5)
    assert pareto.objectives(trial("x", 0.8, 5, 5, score=test))[0] == 0.8  # type: ignore[index]
    assert pareto.objectives(trial("x", 0.8, 5, 5, score=test, validation=None))[0] == 0.7  # type: ignore[index]


def test_named_points_on_a_front_with_a_clear_knee() -> None:
    trials = [trial("accurate", 0.95, 100, 1000), trial("knee", 0.93, 20, 300), trial("cheap", 0.6, 15, 250)]
    trials.append(trial("quick", 0.62, 10, 400))
    names = {name: t.id for name, t in pareto.named(trials).items()}
    assert names == {"most accurate": "accurate", "balanced": "knee", "fastest": "quick", "smallest": "cheap"}


def test_differences_below_the_noise_do_not_decide_what_is_balanced() -> None:
    """A hundredth of accuracy on 150 examples is noise; ten times the seconds is not."""
    names = pareto.named([trial("slow", 0.91, 100, 500), trial("quick", 0.90, 10, 500)])
    assert names["balanced"].id == "quick" and names["most accurate"].id == "slow"


def test_ties_and_useless_points() -> None:
    untuned, poor = Score("accuracy", 0.5, 0.03, 300, 2.0), Score("accuracy", 0.4, 0.03, 300, 2.5)
    fine = Score("accuracy", 0.8, 0.03, 300, 0.5)
    surer = Score("accuracy", 0.9, 0.02, 150, 0.05)
    trials = [
        trial("useless", 0.4, 1, 1, score=poor, untuned_score=untuned),
        trial("one", 0.9, 9, 9, score=fine, untuned_score=untuned),
        trial("two", 0.9, 8, 10, score=fine, untuned_score=untuned, validation=surer),
    ]
    names = pareto.named(trials)
    assert names["most accurate"].id == "two", "equal scores: the lower loss"
    assert names["fastest"].id == "two" and names["smallest"].id == "one", "no better than untuned: no name"
    assert pareto.named(trials[:1])["fastest"].id == "useless", "unless there is nothing else"
    assert pareto.named([]) == {}


def test_test_scores_choose_no_names() -> None:
    """Only points with a name are tested: a bad score there must not hand the name on."""
    untuned = Score("accuracy", 0.55, 0.03, 300, 1.0)
    values = (("a", 0.66, 9), ("b", 0.625, 5), ("c", 0.57, 2))
    trials = [trial(name, value, seconds, seconds, untuned_score=untuned) for name, value, seconds in values]
    before = {name: t.id for name, t in pareto.named(trials).items()}
    trials[0].score = Score("accuracy", 0.54, 0.03, 300, 1.0)
    assert {name: t.id for name, t in pareto.named(trials).items()} == before and before["most accurate"] == "a"


@given(st.lists(grid, min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_named_points_are_on_the_front_and_are_extreme(points: list[tuple[int, int, int]]) -> None:
    trials = [trial(str(i), s / 6, t, m) for i, (s, t, m) in enumerate(points)]
    names = pareto.named(trials)
    best = pareto.front(trials)
    assert set(names) == set(pareto.NAMES) and all(t in best for t in names.values())
    assert pareto.objectives(names["most accurate"])[0] == max(p[0] for p in points) / 6  # type: ignore[index]
    assert pareto.objectives(names["fastest"])[1] == min(p[1] for p in points)  # type: ignore[index]
    assert pareto.objectives(names["smallest"])[2] == min(p[2] for p in points)  # type: ignore[index]


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=12), st.tuples(*[st.integers(1, 5)] * 3))
@settings(max_examples=200, deadline=None)
def test_hypervolume_counts_the_cells_of_a_grid(points: list[tuple[int, ...]], reference: tuple[int, ...]) -> None:
    cells = itertools.product(*(range(r) for r in reference))
    count = sum(any(all(x <= c for x, c in zip(p, cell, strict=True)) for p in points) for cell in cells)
    assert pareto.hypervolume(points, reference) == pytest.approx(count)
    flat = {(c[0], c[1]) for c in itertools.product(*(range(r) for r in reference))}
    area = sum(any(p[0] <= c[0] and p[1] <= c[1] for p in points) for c in flat)
    assert pareto.hypervolume([p[:2] for p in points], reference[:2]) == pytest.approx(area)


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_agrees_with_optuna_and_with_counting_random_points(objectives: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    points = random.random((40, objectives)) * 1.2
    reference = np.ones(objectives)
    ours = pareto.hypervolume(points.tolist(), reference.tolist())
    inside = points[(points < reference).all(axis=1)]
    assert ours == pytest.approx(compute_hypervolume(inside, reference), rel=1e-9)
    darts = random.random((20_000, objectives))
    hits = (points[None, :, :] <= darts[:, None, :]).all(axis=2).any(axis=1).mean()
    assert ours == pytest.approx(hits, abs=4 * 0.5 / math.sqrt(20_000))


def test_hypervolume_edges() -> None:
    assert pareto.hypervolume([], (1, 1, 1)) == 0
    assert pareto.hypervolume([(1, 0, 0), (0, 2, 0), (math.nan, 0, 0), (0, 0, -math.inf)], (1, 1, 1)) == 0
    with pytest.raises(ValueError, match="two objectives or more"):
        pareto.hypervolume([(0,)], (1,))


def test_progress_never_falls_and_ends_at_the_front() -> None:
    random = np.random.default_rng(0)
    trials = [trial(str(i), s, 1 + t, 1 + m) for i, (s, t, m) in enumerate(random.random((30, 3)))]
    trials[4].status = "failed"
    shares = pareto.progress(trials)
    assert shares == sorted(shares) and 0 < shares[0] <= shares[-1] < 1 and shares[4] == shares[3]
    assert pareto.progress(pareto.front(trials), pareto.reference(trials))[-1] == pytest.approx(shares[-1])
    assert pareto.progress([]) == []


def test_command_rebuilds_the_configuration() -> None:
    configuration = full({"method": "lora", "rank": 4, "targets": ["q_proj", "v_proj"], "schedule": "linear"})
    words = shlex.split(pareto.command(trial("x", 0.5, 5, 5, configuration=configuration, seed=3), "my data.jsonl"))
    assert words[:7] == ["metapeft", "train", "my data.jsonl", "--method", "lora", "--steps", "40"]
    assert words[7:11] == ["--backbone", "b", "--seed", "3"]
    given = dict(word.split("=", 1) for word in words[11:] if word != "--set")
    assert given["targets"] == '["q_proj","v_proj"]' and given["schedule"] == "linear" and given["rank"] == "4"
    searched = set(spaces.space(["lora"]).methods["lora"])
    assert searched <= set(given), "what is searched is always said: training starts from the recommendation"


def test_command_sets_what_another_trial_of_the_sweep_varies() -> None:
    plain, decaying = full({"method": "lora"}), full({"method": "lora", "weight_decay": 0.3})
    one, other = trial("x", 0.5, 5, 5, configuration=plain), trial("y", 0.6, 9, 9, configuration=decaying)
    assert "weight_decay" not in pareto.command(one)
    assert "weight_decay=0.0" in shlex.split(pareto.command(one, beside=[one, other]))
    rows = pareto.explain([one, other])
    assert all("weight_decay" in row.command for row in rows) and len(rows) == 2


def test_explain_gives_a_row_per_point_of_the_front() -> None:
    rows = pareto.explain([trial("a", 0.9, 10, 10), trial("b", 0.8, 5, 5), trial("c", 0.7, 6, 6)])
    assert [row.trial for row in rows] == ["a", "b"]
    assert rows[0].names[0] == "most accurate" and set(rows[1].names) >= {"fastest", "smallest"}
    assert rows[0].standard_error == 0.02 and rows[0].command.startswith("metapeft train t ")
