"""The protocol and the fit: honest on tasks left out, never worse than the average where nothing can be learned."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from metapeft.meta import evaluate as protocol
from metapeft.meta import fitting, rivals
from metapeft.meta.evaluate import SBS, Judged, bootstrap, evaluate, gap, judge, judge_on, mean_of
from metapeft.meta.evidence import Observation, without
from metapeft.meta.fitting import fit, folds, groups
from metapeft.meta.model import Model
from tests.meta.synthetic import World, world

CHEAP = (SBS,)


@pytest.fixture(scope="module")
def told() -> World:
    return world(26, filled=0.5)


@pytest.fixture(scope="module")
def judged(told: World) -> list[Judged]:
    return judge(told.observations(), rival=CHEAP)


def test_where_profiles_tell_it_beats_the_single_best_and_is_calibrated(judged: list[Judged]) -> None:
    s = protocol.summary(judged)
    assert gap(judged) < 0.6 and s["gap_high"] < 1 and s["spearman"] > 0.6
    assert 0.84 < s["coverage_90"] < 0.96 and 0.7 < s["coverage_80"] < 0.9
    assert s["ece_within"] < 0.07 and s["ece_best"] < 0.07
    assert 0 < s["floor"] < mean_of(judged, "regret", SBS)


def test_where_profiles_tell_nothing_it_is_the_average_and_stays_calibrated() -> None:
    blind = world(20, filled=0.5, transfer=0.0).observations()
    found = judge(blind, rival=CHEAP)
    assert gap(found) < 1.1
    s = protocol.summary(found)
    assert 0.82 < s["coverage_90"] < 0.98 and s["ece_within"] < 0.08


def test_it_recovers_the_truth_not_the_noise(told: World, judged: list[Judged]) -> None:
    """Predictions lie closer to what is true of a task left out than its own measurements' average over tasks does."""
    ours, flat = [], []
    for j in judged:
        asked = [o for o in told.observations() if o.task.version == j.version]
        true = np.array([told.truth[j.task][_index(o)] for o in asked])
        centred = true - true.mean()
        ours.append(np.mean((np.array(j.mean) - np.mean(j.mean) - centred) ** 2))
        flat.append(np.mean(centred**2))
    assert np.mean(ours) < 0.6 * np.mean(flat)


def _index(observation: Observation) -> int:
    from tests.meta.synthetic import CONFIGURATIONS

    return CONFIGURATIONS.index(observation.configuration)


def test_what_was_measured_on_a_task_is_not_seen_before_it_is_judged(told: World) -> None:
    observations = told.observations()
    (family,) = {o.task.family for o in observations if o.task.name == "sms_spam"}
    mine = [o for o in observations if o.task.family == family]
    changed = [replace(o, gain=1 - o.gain, score=1 - o.score) for o in mine]
    known = without(observations, {family})
    before, after = (judge_on(known, groups(asked), lambda _: Model(reach=0.5), CHEAP)[0] for asked in (mine, changed))
    assert before.mean == after.mean and before.p_best == after.p_best and before.chosen == after.chosen
    assert before.regret != after.regret


def test_the_order_of_observations_changes_nothing(told: World) -> None:
    some = [o for o in told.observations() if o.task.name < "bb_m"]
    one, two = fit(some), fit(some[::-1])
    assert (one.reach, one.length) == pytest.approx((two.reach, two.length), rel=1e-3)
    assert list(one.deviations.values()) == pytest.approx(list(two.deviations.values()), rel=1e-3)
    assert one.choice_scale == pytest.approx(two.choice_scale, rel=1e-3)


def test_folds_keep_families_whole(told: World) -> None:
    parts = folds(told.observations())
    assert len(parts) == fitting.FOLDS
    families = [family for part in parts for family in part]
    assert len(families) == len(set(families)) and set(families) == {o.task.family for o in told.observations()}


def test_uncertainty_grows_with_noise() -> None:
    widths = []
    for tests in (1000, 40):
        found = judge(world(20, filled=0.5, tests=tests).observations(), lambda _: Model(), rival=())
        widths.append(np.mean([np.mean(j.width["0.9"]) for j in found]))
    assert widths[0] < widths[1]


def test_scales_follow_how_wrong_the_model_was() -> None:
    nominal = np.abs(np.random.default_rng(0).standard_normal((60, 20)))
    assert fitting._scale(list(nominal), 60) == pytest.approx(1, abs=0.1)
    assert fitting._scale(list(3 * nominal), 60) == pytest.approx(2.9, abs=0.3)
    assert fitting._scale(list(nominal / 3), 60) == pytest.approx(0.4, abs=0.15)
    assert fitting._scale([], 10**6) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("families", [8, 15, 40])
def test_intervals_hold_in_families_to_come_however_few_were_seen(families: int) -> None:
    """Each family surprises by as much as it likes; the scale comes from some of them, others are asked."""
    random, held = np.random.default_rng(families), []
    for _ in range(400):
        spread = np.exp(0.7 * random.standard_normal(families + 20))
        surprises = list(np.abs(random.standard_normal((families + 20, 20))) * spread[:, None])
        held.append(np.mean(np.array(surprises[families:]) <= 1.645 * fitting._scale(surprises[:families], families)))
    assert np.mean(held) == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("too", [0.1, 4.0])
def test_chances_that_do_not_come_true_are_mended_and_keep_their_order(told: World, too: float) -> None:
    """Too sure or too shy by far: mended on known tasks, checked on other ones."""
    observations = told.observations()
    wrong = replace(fit(observations), choice_scale=too, within=(0.0, 1.0))
    splits = [split for part in folds(observations) if (split := fitting.Split.of(observations, part)).asked]
    mended = fitting._with_chances(wrong, splits)
    others = world(26, seed=1, filled=0.5).observations()
    before, after = (judge(others, lambda _, m=model: m, rival=()) for model in (wrong, mended))  # type: ignore[misc]
    assert protocol.summary(after)["brier_within"] < 0.95 * protocol.summary(before)["brier_within"]
    for one, two in zip(before, after, strict=True):
        assert np.argsort(one.p_within, kind="stable").tolist() == np.argsort(two.p_within, kind="stable").tolist()
    assert Model.from_json(mended.to_json()) == mended
    older = {name: value for name, value in mended.to_json().items() if name != "within"}
    assert Model.from_json(older) == wrong


@pytest.mark.parametrize("tasks", [0, 1, 4])
def test_with_too_little_the_beliefs_stay_and_nothing_is_claimed(tasks: int) -> None:
    few = world(max(1, tasks), filled=0.6).observations() if tasks else []
    assert fit(few) == Model()
    found = evaluate(few)
    json.dumps(found.to_json(), allow_nan=tasks > 0)
    if not tasks:
        assert found.tasks == [] and not any(t["met"] for t in found.targets)


def test_missing_cells_and_missing_profiles(told: World) -> None:
    observations = [o for i, o in enumerate(told.observations()) if i % 3]
    blind = {o.task.name for o in observations if o.task.name.startswith("bb_n")}
    mixed = [replace(o, task=replace(o.task, features=None)) if o.task.name in blind else o for o in observations]
    found = judge([o for o in mixed if o.task.name < "d"], rival=CHEAP)
    assert found and all(np.isfinite(j.mean).all() for j in found)


def test_rivals_know_nothing_of_the_task_and_rank_sensibly(told: World) -> None:
    observations = told.observations()
    effects = rivals.centred_effects(observations)
    true = np.mean([told.truth[name] - told.truth[name].mean() for name in told.truth], axis=0)
    from tests.meta.synthetic import CONFIGURATIONS, key_of

    learned = [effects[key_of(c)][1] for c in CONFIGURATIONS]
    assert np.corrcoef(learned, true)[0, 1] > 0.85
    rank = rivals.defaults("lora")([])
    values = rank(observations[0].task, CONFIGURATIONS, 40)
    assert CONFIGURATIONS[int(values.argmax())]["learning_rate"] == 1e-3


def test_the_bootstrap_is_over_families(judged: list[Judged]) -> None:
    low, high = bootstrap(judged, gap)
    assert low < gap(judged) < high
    assert bootstrap(judged * 2, gap) == pytest.approx((low, high))  # doubling every task's groups adds no evidence
    again = [replace(j, task=f"{j.task} again") for j in judged]  # nor do more tasks of the same families
    assert bootstrap([*judged, *again], gap) == pytest.approx((low, high))


def test_what_another_seed_changes_is_measured() -> None:
    assert protocol.repetition(world(2).observations())["repeated"] == 0
    found = protocol.repetition(world(12, seeds=3).observations())
    assert found["repeated"] == 12 * 20
    assert 0.01 < found["repeat_deviation"] < 0.04  # 300 examples, and 0.01 of the training's own
    assert found["repeat_regret"] == pytest.approx(found["repeat_deviation"] / np.sqrt(np.pi))


def test_targets_say_what_was_missed() -> None:
    assert not any(t["met"] for t in evaluate(world(6, filled=0.5).observations(), curve=False).targets)
    found = evaluate(world(12, filled=0.5).observations(), curve=False)
    assert {t["name"] for t in found.targets} >= {"remaining gap", "Spearman", "coverage of 90 % intervals"}
    assert all(set(t) == {"name", "value", "target", "met"} and isinstance(t["met"], bool) for t in found.targets)
    oracle = next(row for row in found.selectors if row["selector"] == "oracle")
    assert oracle["regret"] == 0 and oracle == found.selectors[0]
    assert found.summary["risk_coverage"][-1]["answered"] == 1
