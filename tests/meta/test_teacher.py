"""The loss helps where score and loss tell one story, and keeps out where they do not."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from metapeft.meta.evidence import Observation, gather
from metapeft.meta.gains import gain
from metapeft.meta.teacher import LEAST, taught
from tests.meta.synthetic import CONFIGURATIONS, World, world


def error(found: World, observations: list[Observation]) -> float:
    """Root mean squared distance of gains from the truth, each task's level taken out."""
    base = {t.task: t.untuned_score.value for t in found.trials if t.untuned_score}
    by_task: dict[str, list[float]] = {}
    for o in observations:
        true = found.truth[o.task.name][CONFIGURATIONS.index(o.configuration)]
        by_task.setdefault(o.task.name, []).append(o.gain - gain(true, base[o.task.name]))
    return float(np.sqrt(np.mean([np.var(values) for values in by_task.values()])))


def test_it_comes_closer_to_the_truth_and_says_how_close() -> None:
    found = world(30, filled=0.6, tests=60)
    raw = gather(found.trials, found.features)
    after = taught(raw)
    assert error(found, after) < 0.9 * error(found, raw)
    assert np.mean([o.error for o in after]) < np.mean([o.error for o in raw])
    assert [o.score for o in after] == [o.score for o in raw]  # what is judged stays what was measured


def test_a_loss_that_tells_another_story_changes_little() -> None:
    found = world(20, filled=0.6)
    raw = gather(found.trials, found.features)
    losses = [o.loss for o in raw]
    random.Random(0).shuffle(losses)
    strange = [replace(o, loss=loss) for o, loss in zip(raw, losses, strict=True)]
    moved = np.abs([a.gain - b.gain for a, b in zip(taught(strange), strange, strict=True)])
    spread = np.std([o.gain for o in raw])
    assert moved.mean() < 0.15 * spread


def test_too_few_and_the_order() -> None:
    found = world(3, filled=0.9)
    raw = gather(found.trials, found.features)
    few = [o for o in raw if o.task.name == "trec6"][: LEAST - 1]
    assert taught(few) == few and taught([]) == []
    back = taught(raw[::-1])[::-1]
    assert [o.gain for o in back] == pytest.approx([o.gain for o in taught(raw)])
