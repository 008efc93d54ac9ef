"""From trials to observations: what counts, what is averaged, what the order of trials may not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metapeft.meta import gains
from metapeft.meta.evidence import FEATURES, Known, gather
from metapeft.meta.gains import gain, score
from metapeft.meta.knowledge import Knowledge
from metapeft.training.trial import Score
from tests.meta.made import BACKBONE, profile, task, trial

unit = st.floats(0, 1)


@given(unit, unit)
def test_score_is_the_inverse_of_gain(tuned: float, untuned: float) -> None:
    found = gain(tuned, untuned)
    assert -1 <= found <= 1
    room = 1 - untuned if tuned >= untuned else untuned
    back = float(score(np.array(found), np.array(untuned)))
    assert back == pytest.approx(tuned, abs=1e-9 if room >= gains.FLOOR else gains.FLOOR)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), unit)
def test_scores_stay_in_range_and_in_order(values: list[float], untuned: float) -> None:
    found = score(np.sort(values), np.array(untuned))
    assert (found >= 0).all() and (found <= 1).all() and (np.diff(found) >= 0).all()


def test_seeds_are_averaged_and_budgets_are_not() -> None:
    (one,) = gather([trial(0.9), trial(0.8, seed=1)], {})
    assert one.gain == pytest.approx(0.7) and one.repeats == 2 and one.score == pytest.approx(0.85)
    assert one.error == pytest.approx(0.04)  # the test split is the same: another seed does not halve its error
    assert len(gather([trial(0.9), trial(0.9, budget=15)], {})) == 2
    assert len(gather([trial(0.9), trial(0.9, learning_rate=2e-3)], {})) == 2
    assert len(gather([trial(0.9, device="cpu"), trial(0.9, seed=1, device="metal")], {})) == 2


def test_the_score_is_the_test_splits_alone_and_the_gain_is_that_of_both_splits() -> None:
    held = Score("accuracy", 0.7, 0.04, 100, 1.0)
    (one,) = gather([trial(0.9, validation=held)], {})  # 300 test examples, 100 validation examples
    assert one.score == 0.9 and one.validation == 0.7
    assert one.gain == pytest.approx(gain(0.85, 0.5)) and one.error < 0.04
    (diverged,) = gather([trial(None, validation=held, status="diverged")], {})
    assert diverged.score == 0.5


def test_scores_by_different_metrics_are_never_averaged() -> None:
    f1 = Score("macro_f1", 0.4, 0.03, 300, 0.5)
    other = replace(trial(0.9, seed=1), score=f1, untuned_score=f1)
    found = gather([trial(0.9), other], {})
    assert sorted((o.task.metric, o.score, o.repeats) for o in found) == [("accuracy", 0.9, 1), ("macro_f1", 0.4, 1)]
    assert found[0].task != found[1].task


def test_failures_teach_what_they_can() -> None:
    (diverged,) = gather([trial(None, status="diverged")], {})
    assert diverged.gain == 0 and diverged.score == 0.5
    assert gather([trial(None, status=s) for s in ("out_of_memory", "failed", "ok")], {}) == []
    assert gather([trial(0.9, untuned=None)], {}) == []
    assert gather([trial(0.9, untuned=None)], {}, {(task().version, BACKBONE): 0.5})[0].gain == pytest.approx(0.8)
    assert gather([trial(float("nan"))], {}) == []


def test_a_curve_that_broke_off_says_less_than_a_finished_one() -> None:
    held = Score("accuracy", 0.7, 0.03, 150, 1.0)

    def stopped(step: int) -> float:
        curve = [{"step": step, "validation_score": 0.7}]
        return gather([trial(None, validation=held, status="stopped", curve=curve)], {})[0].error

    (finished,) = gather([trial(0.7)], {})
    assert finished.error < stopped(90) < stopped(60) < stopped(30)


def test_the_order_of_trials_changes_nothing() -> None:
    trials = [trial(0.5 + 0.1 * i, f"t{i % 3}", seed=i // 3, learning_rate=1e-3 * (1 + i % 2)) for i in range(8)]
    features = {(task("t0").version, BACKBONE): profile("t0").features}
    assert gather(trials, features) == gather(trials[::-1], features)
    assert [o.task.features is not None for o in gather(trials, features)].count(True) > 0


def test_a_task_is_its_content_not_its_name() -> None:
    here = Known("v", "b", "name", "family", 100, profile().features)
    assert here == Known("v", "b", "other", "other", 5) != Known("w", "b", "name", "family", 100)
    assert here.vector.shape == (len(FEATURES),) and np.abs(here.vector).max() <= 4
    assert not Known("v", "b", "name", "family", 100).vector.any()


def test_errors_are_on_the_scale_of_what_was_won_or_lost() -> None:
    (lost,) = gather([trial(0.6, untuned=0.9)], {})
    assert lost.gain == pytest.approx(-1 / 3) and lost.error == pytest.approx(0.02 / 0.9)
    (won,) = gather([trial(0.95, untuned=0.9)], {})
    assert won.gain == pytest.approx(0.5) and won.error == pytest.approx(0.02 / 0.1)


def test_how_often_a_training_looks_at_itself_is_no_other_configuration() -> None:
    (one,) = gather([trial(0.9), trial(0.8, evaluations=2, seed=1)], {})
    assert one.repeats == 2


def test_the_untuned_score_of_another_backbone_is_none_of_this_one() -> None:
    here = (task().version, BACKBONE)
    known = Knowledge(
        (trial(0.8, untuned=0.5), replace(trial(0.7, untuned=None), backbone="big/model")),
        {here: profile(), (here[0], "big/model"): replace(profile(untuned=0.85), backbone="big/model")},
    )
    assert known.untuned == {here: 0.5, (here[0], "big/model"): 0.85}
    assert {o.task.backbone: o.untuned for o in known.observations()} == {BACKBONE: 0.5, "big/model": 0.85}


def test_work_on_another_device_or_by_another_metric_is_other_work() -> None:
    (cpu,), (metal,) = gather([trial(0.9)], {}), gather([trial(0.9, device="metal")], {})
    f1 = replace(cpu, task=replace(cpu.task, metric="macro_f1"))
    assert len({cpu.id, metal.id, f1.id}) == 3
