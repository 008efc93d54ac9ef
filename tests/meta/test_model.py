"""The Gaussian model of gains: a proper posterior, task-centring, shrinkage, budgets, other backbones, fitted
variances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.meta import prior
from metapeft.meta.evidence import Known, Observation
from metapeft.meta.model import Conditioned, Model, Places, fit_deviations, terms, together
from metapeft.meta.portfolio import portfolio
from metapeft.meta.threads import one_thread
from metapeft.meta.versions import shipped
from metapeft.training.configuration import full
from tests.meta.made import profile
from tests.meta.synthetic import world

DEFAULTS = [full(c) for c in portfolio(30)]


def known(name: str, backbone: str = "b", **values: Any) -> Known:
    return Known(name, backbone, name, name, values.get("size", 1000), values.get("features"))


def seen(
    task: str | Known, configuration: dict[str, Any], gain: float, error: float = 0.05, **values: Any
) -> Observation:
    place = known(task) if isinstance(task, str) else task
    return Observation(place, configuration, values.get("steps", 40), gain, error, values.get("repeats", 1))


def believed(
    evidence: list[Observation], task: Known | None = None, steps: int = 40, model: Model | None = None
) -> Any:
    return Conditioned(model or Model(), evidence).predict(task or known("new"), DEFAULTS, steps)


def test_another_file_of_the_same_name_is_the_same_task_as_far_as_it_is_alike() -> None:
    """Beside the same evidence under another name; of the catalog's names nobody else has one."""
    features = profile().features
    unlike = {name: value + 30.0 for name, value in features.items()}

    def told(name: str, rows: dict[str, float]) -> float:
        other = Known("elsewhere", "b", name, name, 1000, rows)
        here = Known("here", "b", "tickets", "tickets", 1000, features)
        return float(believed([seen(other, c, -0.4) for c in DEFAULTS[:4]], here)[0].mean())

    assert told("tickets", features) < told("tickets", unlike) - 0.05
    assert abs(told("tickets", unlike) - told("others", unlike)) < 0.05

    def catalogs(name: str) -> float:
        here = Known("here", "b", "sms_spam", "sms_spam", 1000, features)
        other = Known("elsewhere", "b", name, name, 2000, unlike)
        return float(believed([seen(other, c, -0.4) for c in DEFAULTS[:4]], here)[0].mean())

    assert catalogs("sms_spam") < catalogs("others") - 0.05


def test_without_evidence_the_portfolio_is_what_is_believed() -> None:
    mean, covariance = believed([])
    assert mean.tolist() == [prior.expected(c) for c in DEFAULTS]
    assert (np.linalg.eigvalsh(covariance) > -1e-9).all()
    assert (np.sqrt(np.diag(covariance)) > 0.3).all()  # little is known


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 14), st.floats(-0.5, 1)), max_size=12))
def test_evidence_never_widens_and_stays_a_covariance(values: list[tuple[str, int, float]]) -> None:
    _, before = believed([], known("a"))
    mean, after = believed([seen(task, DEFAULTS[i], value, 0.1) for task, i, value in values], known("a"))
    assert np.isfinite(mean).all()
    assert (np.diag(after) <= np.diag(before) + 1e-9).all()
    assert np.linalg.eigvalsh(after).min() > -1e-8


def test_the_order_of_the_evidence_changes_nothing() -> None:
    evidence = world(12, filled=0.3).observations()
    mean, covariance = believed(evidence)
    again, same = believed(evidence[::-1])
    assert again == pytest.approx(mean, abs=1e-9) and same == pytest.approx(covariance, abs=1e-9)


def test_a_result_moves_its_own_configuration_most_then_its_method() -> None:
    lora, near = full({"method": "lora", "learning_rate": 1e-3}), full({"method": "lora", "learning_rate": 8e-4})
    far, prefix = full({"method": "lora", "learning_rate": 3e-5}), full({"method": "prefix", "learning_rate": 5e-3})
    candidates = [lora, near, far, prefix]
    before, _ = Conditioned(Model(), []).predict(known("t"), candidates, 40)
    conditioned = Conditioned(Model(), [seen("t", lora, 0.95, 0.01, repeats=20)])
    after, covariance = conditioned.predict(known("t"), candidates, 40)
    moved = after - before
    assert moved[0] > moved[1] > moved[2] > moved[3] > 0  # the last by the task's level alone
    assert after[0] == pytest.approx(0.95, abs=0.03) and np.sqrt(covariance[0, 0]) < 0.05
    elsewhere, _ = conditioned.predict(known("another"), candidates, 40)
    assert 0 < elsewhere[0] - before[0] < 0.6 * moved[0]


def test_a_noisier_result_moves_less_and_leaves_more_open() -> None:
    means, widths = [], []
    for error in (0.01, 0.1, 0.4):
        mean, covariance = believed([seen("new", DEFAULTS[0], 0.95, error)])
        means.append(mean[0])
        widths.append(covariance[0, 0])
    assert means == sorted(means, reverse=True) and widths == sorted(widths)
    once, twice = (believed([seen("new", DEFAULTS[0], 0.95, repeats=n)])[1][0, 0] for n in (1, 4))
    assert twice < once


def test_with_many_tasks_the_order_is_that_of_the_task_centred_averages() -> None:
    random = np.random.default_rng(0)
    levels = random.normal(0.4, 0.3, size=30)
    effects = np.linspace(0.2, -0.2, len(DEFAULTS))[random.permutation(len(DEFAULTS))]
    table = levels[:, None] + effects + random.normal(0, 0.05, size=(30, len(DEFAULTS)))
    mean, _ = believed([seen(f"task {t}", c, float(table[t, i])) for t in range(30) for i, c in enumerate(DEFAULTS)])
    centred = (table - table.mean(axis=1, keepdims=True)).mean(axis=0)
    assert np.corrcoef(np.argsort(np.argsort(mean)), np.argsort(np.argsort(centred)))[0, 1] > 0.98
    assert mean.argmax() == centred.argmax()


def test_a_task_being_easy_is_not_a_merit_of_what_was_tried_on_it() -> None:
    good, bad = DEFAULTS[1], DEFAULTS[-1]
    evidence = []
    for index in range(10):
        # Hard tasks were tried with both, easy ones with the worse one only: averages would prefer that.
        evidence += [seen(f"hard {index}", good, 0.3), seen(f"hard {index}", bad, 0.1), seen(f"easy {index}", bad, 0.9)]
    mean, _ = Conditioned(Model(), evidence).predict(known("new"), [good, bad], 40)
    assert mean[0] > mean[1] + 0.05


def test_little_evidence_moves_little_and_more_moves_more() -> None:
    counts = (0, 1, 2, 5, 20)
    moved = [believed([seen(f"t{i}", DEFAULTS[0], -0.5, 0.2) for i in range(n)])[0][0] for n in counts]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] - moved[1] < 0.4 * (moved[0] - moved[-1])


def test_another_budget_says_less_and_a_longer_one_of_all_methods_alike() -> None:
    at = {steps: believed([seen("new", DEFAULTS[0], 0.95, steps=steps)])[1][0, 0] for steps in (5, 20, 40, 320)}
    assert at[40] < at[20] < at[5] and at[40] < at[320]


def test_another_backbone_counts_less_and_its_uncertainty_is_larger() -> None:
    def evidence(backbone: str) -> list[Observation]:
        tasks = [known(f"t{i}", backbone) for i in range(10)]
        return [seen(t, c, 0.8 - 0.1 * (i % 5)) for t in tasks for i, c in enumerate(DEFAULTS)]

    before, _ = believed([])
    ours, sure = believed(evidence("b"))
    theirs, unsure = believed(evidence("other"))
    assert np.abs(theirs - before).sum() < np.abs(ours - before).sum()
    assert (np.diag(unsure) > np.diag(sure)).all()
    centre = np.eye(len(DEFAULTS)) - 1 / len(DEFAULTS)
    assert np.trace(centre @ unsure @ centre) > 1.2 * np.trace(centre @ sure @ centre)


def test_reach_zero_means_that_similar_tasks_teach_nothing_of_their_own() -> None:
    found = world(20, filled=0.5)
    evidence = found.observations()
    tasks = sorted({o.task for o in evidence}, key=lambda t: t.name)
    for reach, differ in ((0.0, False), (1.0, True)):
        conditioned = Conditioned(Model(reach=reach), [o for o in evidence if o.task not in tasks[:2]])
        first, second = (conditioned.predict(t, DEFAULTS, 40)[0] for t in tasks[:2])
        assert (np.ptp((first - second).round(9)) > 0) == differ


def test_fitting_finds_the_noise_and_the_spread_that_are_there() -> None:
    random = np.random.default_rng(3)
    evidence = []
    for t in range(25):
        level = random.normal(0, 0.3)
        for i, c in enumerate(DEFAULTS):
            effect = 0.2 * np.sin(i) + random.normal(0, 0.02)
            evidence.append(seen(f"t{t}", c, prior.expected(c) + level + effect, 0.001))
    with one_thread():
        found = fit_deviations(evidence, Model())
        noisy = fit_deviations([replace(o, gain=o.gain + random.normal(0, 0.15)) for o in evidence], Model())
    assert found.deviations["task"] + found.deviations["task_linear"] == pytest.approx(0.4, abs=0.2)
    assert found.deviations["seed"] < 0.04 < 0.1 < noisy.deviations["seed"]
    assert Model.from_json(found.to_json()) == found


def test_what_another_device_needs_is_learned_from_few_trials_there() -> None:
    small, large = full({"method": "lora", "learning_rate": 1e-4}), full({"method": "lora", "learning_rate": 1e-3})
    cpu = [seen(f"t{i}", c, g) for i in range(30) for c, g in ((small, 0.4), (large, 0.7))]
    metal = [seen(f"m{i}", c, g) for i in range(3) for c, g in ((small, 0.7), (large, 0.4))]
    cpu, metal = ([replace(o, device=name) for o in evidence] for name, evidence in (("cpu", cpu), ("metal", metal)))
    with one_thread():
        model = fit_deviations([*cpu, *metal], Model())
    conditioned = Conditioned(model, [*cpu, *metal])
    order = {d: conditioned.predict(known("new"), [small, large], 40, d)[0].argmax() for d in ("cpu", "metal")}
    assert order == {"cpu": 1, "metal": 0}


def test_with_one_device_nothing_is_said_of_others() -> None:
    evidence = [replace(o, device="cpu") for o in world(12, filled=0.3).observations()]
    with one_thread():
        model = fit_deviations(evidence, Model())
        same = fit_deviations([replace(o, device="") for o in evidence], Model())
    assert model == same and model.deviations["device"] == 0
    here, elsewhere = (Conditioned(model, evidence).predict(known("new"), DEFAULTS, 40, d) for d in ("cpu", "metal"))
    assert np.array_equal(here[0], elsewhere[0]) and np.array_equal(here[1], elsewhere[1])


def test_a_version_of_before_devices_were_told_apart_is_read() -> None:
    record = Model().to_json()
    del record["deviations"]["device"]
    assert Model.from_json(record) == Model()


def test_the_same_rows_on_two_backbones_and_other_rows_of_that_name_make_no_contradiction() -> None:
    """Two versions of a file, one of them on two backbones that see it differently: still a covariance."""
    usual = profile().features
    far = {name: value + (1.0 if name.startswith("domain") else 0.0) for name, value in usual.items()}
    places = [
        Known("v1", "small", "tickets", "tickets", 600, usual),
        Known("v1", "big", "tickets", "tickets", 600, far),
        Known("v2", "small", "tickets", "tickets", 604, usual),
    ]
    model = shipped().model
    evidence = [seen(place, c, 0.4, 0.03) for place in places for c in DEFAULTS]
    points = Places.seen(evidence)
    values = np.linalg.eigvalsh(together(model, terms(model, points, points)))
    assert values.min() > -1e-9
    mean, covariance = Conditioned(model, evidence).predict(places[0], DEFAULTS, 40)
    assert np.isfinite(mean).all() and (np.diag(covariance) > 0).all()
