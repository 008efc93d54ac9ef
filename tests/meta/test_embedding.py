"""The learned metric finds the features that decide how configurations fare, and is a metric."""

from __future__ import annotations

import numpy as np
import pytest

from metapeft.meta.embedding import Metric, learn, plain
from metapeft.meta.evidence import FEATURES
from tests.meta.synthetic import world


def test_what_decides_weighs_most() -> None:
    weights = learn(world(40, filled=0.6).observations()).to_json()
    ranked = sorted(FEATURES, key=lambda name: -weights[name])
    assert set(ranked[:4]) >= {"zero_shot_loss", "label_entropy"}  # the first and second trait, see the synthetic world


def test_it_is_a_metric_and_its_similarity_a_kernel() -> None:
    observations = world(20, filled=0.6).observations()
    metric = learn(observations)
    tasks = sorted({o.task for o in observations}, key=lambda t: t.name)
    assert all(weight >= 0 for weight in metric.weights)
    found = metric.similarity(tasks, tasks)
    assert np.allclose(np.diag(found), 1) and np.allclose(found, found.T) and (found >= 0).all()
    assert np.linalg.eigvalsh(found).min() > -1e-9
    points = np.array([metric.embed(t) for t in tasks])
    apart = ((points[:, None] - points) ** 2).sum(axis=-1)
    assert np.exp(-0.5 * apart) == pytest.approx(found)


def test_with_too_little_it_is_the_plain_profile() -> None:
    assert learn([]) == plain()
    assert learn(world(4, filled=0.6).observations()) == plain()


def test_order_and_json() -> None:
    observations = world(20, filled=0.5).observations()
    metric = learn(observations)
    assert learn(observations[::-1]).weights == pytest.approx(metric.weights, abs=1e-6)
    assert Metric.from_json(metric.to_json()) == metric
