"""Feedback is on disk when it is accepted, holds no text, and a version that got worse is found."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest

from metapeft.monitoring import feedback
from metapeft.monitoring.feedback import watch


def test_it_is_kept_without_text_and_the_last_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    feedback.record("spam@1", "wrong", "cmpl-1/0", answer="secret", correct="also secret")
    feedback.record("spam@1", "right", "cmpl-1/0")
    feedback.record("spam@1", "right")
    feedback.record("spam@1", "right")
    found = feedback.read()
    assert [f.verdict for f in found] == ["right"] * 3, "judged again: once; without an id: each time"
    assert "secret" not in feedback.path().read_text() and stat.S_IMODE(feedback.path().stat().st_mode) == 0o600
    monkeypatch.setenv("METAPEFT_FEEDBACK_TEXT", "1")
    feedback.record("spam@1", "wrong", "cmpl-2/0", answer="yes", correct="no")
    assert feedback.read()[-1].correct == "no"


def test_a_line_that_a_kill_cut_short_costs_nothing_else() -> None:
    feedback.record("spam@1", "right", "a/0")
    with feedback.path().open("ab") as file:
        file.write(b'{"at": "2026-01-01T00:00:00+00:00", "mod')
    feedback.record("spam@1", "wrong", "b/0")
    assert [f.id for f in feedback.read()] == ["a/0", "b/0"]
    assert all(json.loads(line) for line in feedback.path().read_text().splitlines() if line.endswith("}"))


def test_false_alarms_are_as_rare_as_stated() -> None:
    """At exactly the accuracy that is just acceptable: no more than one in LENGTH answers, over 100,000."""
    random = np.random.default_rng(0)
    promised, error = 0.9, 0.02
    least = promised - feedback.ERRORS * error - feedback.SLACK
    alarms = sum(watch("m", random.random(10_000) < least, promised, error).fired is not None for _ in range(10))
    assert alarms <= 10 * 10_000 / feedback.LENGTH
    calm = sum(watch("m", random.random(10_000) < promised, promised, error).fired is not None for _ in range(10))
    assert calm == 0


@pytest.mark.parametrize("accuracy", [0.5, 0.65])
def test_a_version_that_got_worse_is_found_soon(accuracy: float) -> None:
    random = np.random.default_rng(1)
    right = np.concatenate([random.random(500) < 0.9, random.random(200) < accuracy])
    found = watch("m", right, 0.9, 0.02)
    assert found.fired is not None and 500 < found.fired < 600
    assert found.since is not None and abs(found.since - 500) < 25
    assert found.evidence >= 1 and found.accuracy < 0.8


def test_it_is_over_when_answers_are_right_again() -> None:
    random = np.random.default_rng(2)
    right = np.concatenate([random.random(100) < 0.9, random.random(80) < 0.4, random.random(400) < 0.95])
    assert watch("m", right[:180], 0.9, 0.02).fired is not None
    assert watch("m", right, 0.9, 0.02).fired is None


def test_a_score_that_promises_nothing_is_never_broken() -> None:
    """A test score of nought, or of nearly that: there are such adapters."""
    for promised, error in ((0.0, 0.005), (0.007, 0.005)):
        found = feedback.watch("a@1", [False] * 30_000, promised, error)
        assert found.fired is None and found.evidence == 0 and found.accuracy == 0
