"""What a sweep allows, before a trial is run: its own limits, at its own number of steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from metapeft import stages
from metapeft.errors import UserError
from metapeft.meta import Experience, recommend
from metapeft.search import spaces
from metapeft.settings import load_settings
from metapeft.stages.budget import Budget
from metapeft.stages.sweep import Expected, check
from tests.meta.made import SPEED, profile, task
from tests.stages.made import spam_file


def budget(tmp_path: Path, narrow: dict[str, Any] | None = None, **sweep: Any) -> tuple[Budget, list[dict[str, Any]]]:
    """Of a sweep after a recommendation for 120 steps, and what is recommended."""
    settings = load_settings(sweep=sweep)
    found = recommend(task(), profile(), settings, Experience(tmp_path / "experience", shipped=None), SPEED).to_json()
    expected = Expected(profile(), SPEED, found["recommendations"], settings.sweep.steps)
    methods = settings.sweep.methods
    return Budget(settings, spaces.space(methods, narrow), expected, found["steps"]), [
        entry["configuration"] for entry in found["recommendations"]
    ]


def test_a_trial_needs_less_than_the_final_training(tmp_path: Path) -> None:
    whole, recommended = budget(tmp_path, steps=120)
    short, _ = budget(tmp_path, steps=2)
    for configuration in recommended:
        (seconds, memory), (all_seconds, all_memory) = short.needs(configuration), whole.needs(configuration)  # type: ignore[misc]
        assert seconds < all_seconds / 4 and 0 < memory <= all_memory
    assert short.needs({"method": "lora", "learning_rate": 1e-3}) is not None
    assert budget(tmp_path, methods=["prompt"])[0].needs({"method": "lora", "learning_rate": 1e-3}) is None


def test_limits_hold_at_the_steps_of_a_trial(tmp_path: Path) -> None:
    whole, recommended = budget(tmp_path, steps=120)
    least = min(whole.needs(c)[0] for c in recommended)  # type: ignore[index]
    with pytest.raises(
        UserError, match=r"\(--max-trial-seconds\) excludes every .* 120 steps .*sweep.steps \(--steps\)"
    ):
        budget(tmp_path, steps=120, max_trial_seconds=least * 0.9)[0].check(recommended)
    short, _ = budget(tmp_path, steps=2, max_trial_seconds=least * 0.9)
    short.check(recommended)
    assert short.allowed(recommended)
    narrow, _ = budget(tmp_path, {"steps": 2}, steps=120, max_trial_seconds=least * 0.9)
    narrow.check(recommended)


def test_what_it_says_is_enough_is_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(--max-memory-mb\)") as error:
        tight, recommended = budget(tmp_path, max_memory_mb=10)
        tight.check(recommended)
    enough = re.search(r"at least (\d+) MB", str(error.value))
    assert enough is not None and "steps" not in str(error.value)
    fitting, recommended = budget(tmp_path, max_memory_mb=int(enough[1]))
    fitting.check(recommended)
    assert 0 < len(fitting.allowed(recommended)) < len(recommended)
    other, recommended = budget(tmp_path, methods=["prompt"], max_memory_mb=1)
    with pytest.raises(UserError, match=r"\(prompt\)"):
        other.check(recommended)


def test_a_sweep_that_only_repeats_is_refused() -> None:
    check(load_settings(sweep={"trials": 4, "repeats": 3}))
    check(load_settings(sweep={"trials": 1, "repeats": 0}))
    with pytest.raises(UserError, match="repeats=9 leaves none of the 8 trials"):
        check(load_settings(sweep={"repeats": 9}))


def test_rows_that_limits_leave_out_are_told_once_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings(task=str(spam_file(tmp_path)), data={"max_train": 12, "max_validation": 4, "max_test": 6})
    for _ in range(2):  # the second finds the stage done
        stages.run(("version", "validate"), settings, tmp_path / "work")
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("version: using 12 of 70 training rows (data.max_train)") == 1
