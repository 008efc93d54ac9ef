"""Forecasts: curves that go on as others did, the meta-model's opinion, and what of it reaches the alternatives."""

from __future__ import annotations

import numpy as np
import pytest

from metapeft.meta.evidence import Known, gather
from metapeft.meta.experience import Experience
from metapeft.meta.model import Model
from metapeft.switching.curves import LEAST, Extrapolation, Moment, moment, moments
from metapeft.switching.forecast import Calibration, Checked, Forecaster, Joint, calibrated, coverage, cross_checked
from metapeft.training.trial import Score, Trial

random = np.random.default_rng(0)


def trial(task: str, final: float, speed: float, noise: float = 0.02, number: int = 0) -> Trial:
    """A curve that rises to `final` exponentially, looked at four times."""
    curve = []
    for step in (10, 20, 30, 40):
        score = float(np.clip(final * (1 - np.exp(-speed * step / 40)) / (1 - np.exp(-speed)), 0, 1))
        seen = float(np.clip(score + noise * random.standard_normal(), 0, 1))
        loss = 2.0 * (1.05 - score)
        row = {"step": step, "seconds": step / 4, "train_loss": loss, "validation_loss": loss, "validation_score": seen}
        curve.append(row)
    return Trial(
        id=f"{task}{number}",
        task=task,
        task_version=task,
        backbone="b",
        method="lora",
        configuration={"method": "lora"},
        seed=number,
        budget=40,
        status="ok",
        score=Score("accuracy", float(np.clip(final + noise * random.standard_normal(), 0, 1)), 0.02, 300, 1.0),
        untuned_score=Score("accuracy", 0.1, 0.02, 300, 3.0),
        curve=curve,
    )


def made(tasks: int = 12, each: int = 8) -> list[Trial]:
    return [
        trial(f"task{t}", float(random.uniform(0.2, 0.95)), float(random.uniform(1, 5)), number=n)
        for t in range(tasks)
        for n in range(each)
    ]


def test_curves_of_other_tasks_tell_how_this_one_ends() -> None:
    recorded = moments(made())
    assert len(recorded) == 12 * 8 * 3
    known = Extrapolation(recorded)
    for left, share in ((0.75, 0.95), (0.25, 0.8)):
        errors, away = [], []
        for m in moments(made(40)):
            if abs(m.left - left) < 0.01:
                mean, deviation = known.predict(m)
                errors.append(m.best + m.rise - mean)
                away.append((m.best + m.rise - mean) / deviation)
        spread = np.std([m.rise for m in recorded if abs(m.left - left) < 0.01])
        assert np.sqrt(np.mean(np.square(errors))) < share * spread
        # A dozen tasks know little of how much tasks differ; what is too narrow `calibrated` widens.
        assert 0.7 <= np.mean(np.abs(away) < 1.645) <= 1.0


def test_less_that_is_left_is_surer() -> None:
    known = Extrapolation(moments(made()))
    one = trial("other", 0.8, 3.0)
    deviations = [known.predict(moment(one.curve[:n], 40, 0.1))[1] for n in (1, 2, 3)]
    assert deviations[0] > deviations[2]


def test_without_curves_there_is_a_wide_belief() -> None:
    known = Extrapolation([])
    assert not known.known and LEAST > 0
    mean, deviation = known.predict(moment(trial("t", 0.5, 2.0).curve[:1], 40, 0.1))
    assert deviation > 0.1 and -1 < mean < 1.2


def test_the_same_moments_give_the_same_predictions() -> None:
    recorded = moments(made(8))
    at: Moment = recorded[5]
    assert Extrapolation(recorded).predict(at) == Extrapolation(recorded).predict(at)


def test_a_bad_curve_lowers_an_alternative_that_shares_its_reason_and_no_other() -> None:
    before = Joint(np.array([0.5, 0.5, 0.5]), np.array([[0.04, 0.03, 0.0], [0.03, 0.04, 0.0], [0.0, 0.0, 0.04]]))
    after = before.given(0.0, 0.05)
    assert after.mean[0] < 0.1 and after.mean[1] < 0.25
    assert after.mean[2] == pytest.approx(0.5)
    assert after.covariance[0, 0] < before.covariance[0, 0]
    assert np.linalg.eigvalsh(after.covariance).min() > -1e-12


def test_given_is_conditioning_on_a_noisy_measurement() -> None:
    """With caution 1 it equals the textbook's update of a joint Gaussian."""
    root = random.standard_normal((3, 3))
    covariance, mean = root @ root.T, random.standard_normal(3)
    gain, deviation = 0.3, 0.4
    weight = covariance[:, 0] / (covariance[0, 0] + deviation**2)
    found = Joint(mean, covariance).given(gain, deviation)
    np.testing.assert_allclose(found.mean, mean + weight * (gain - mean[0]))
    np.testing.assert_allclose(found.covariance, covariance - np.outer(weight, covariance[0]))


def test_calibration_finds_who_is_right_and_how_wide() -> None:
    checked = []
    for n in range(600):
        truth = float(random.uniform(0, 1))
        curve = (truth + 0.2 * float(random.standard_normal()), 0.1)  # twice as far off as it says
        model = (truth + 0.4 * float(random.standard_normal()), 0.1)  # four times as far off
        checked.append(Checked(f"family{n % 6}", 0.5, curve, model, truth))
    chosen = calibrated(checked)
    assert chosen.caution == 2.0 and 1.5 < chosen.width < 2.3
    assert coverage([away for _, away in cross_checked(checked)]) == pytest.approx(0.9, abs=0.04)
    assert calibrated([]) == Calibration()


def test_the_shipped_curves_are_covered_as_stated(tmp_path: object) -> None:
    """Of the curves that ship, with intervals of the curve alone, each family by the others."""
    recorded = moments(Experience().trials())
    families = sorted({m.family for m in recorded})
    assert len(families) >= 3
    inside = []
    for family in families:
        known = Extrapolation([m for m in recorded if m.family != family])
        inside += [
            abs(m.best + m.rise - mean) < 1.645 * deviation
            for m in recorded
            if m.family == family
            for mean, deviation in [known.predict(m)]
        ]
    assert 0.8 <= np.mean(inside) <= 1.0


def test_a_forecaster_without_experience_believes_the_portfolio() -> None:
    here = Known("v", "b", "t", "t", 100)
    told = Forecaster(here, gather([], {}), [], Model(), 0.2, 300).before(
        [({"method": "lora", "learning_rate": 1e-3}, 40), ({"method": "lora", "learning_rate": 1e-6}, 40)]
    )
    assert told.mean.shape == (2,) and told.covariance.shape == (2, 2)
    assert told.mean[0] > told.mean[1]
