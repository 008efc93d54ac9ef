"""Which way of choosing is better: on outcomes whose truth is known, and from runs in MLflow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metapeft import cli, tracking
from metapeft.data.task import Task
from metapeft.settings import Settings
from metapeft.tracking.selections import Outcome, compared, selections
from metapeft.training.trial import Score
from tests.tracking.made import make_trial


def world(gain: float, tasks: int = 12, noise: float = 0.01, seed: int = 0) -> list[Outcome]:
    """Two strategies on tasks of very different difficulty; the second is better by `gain`, on texts only."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(tasks):
        level, domain = random.uniform(0.3, 0.9), "texts" if number % 2 else "sums"
        extra = gain if domain == "texts" else 0.0
        for strategy, value in (("portfolio", level), ("experience", level + extra)):
            score = float(value + noise * random.standard_normal())
            found.append(Outcome(f"{number}", strategy, f"task {number}", domain, score, noise, level + 0.1))
    return found


def test_a_real_difference_is_found_where_it_is() -> None:
    found = compared(world(0.06))
    pairs = {pair.domain: pair for pair in found.pairs}
    assert pairs["texts"].verdict == pairs["all"].verdict == "experience is better"
    assert pairs["texts"].difference == pytest.approx(0.06, abs=0.02) and pairs["texts"].low > 0
    assert pairs["sums"].verdict == "cannot tell" and pairs["sums"].tasks == 6
    best = {s.domain: s for s in reversed(found.strategies)}
    assert best["all"].strategy == "experience" and best["all"].regret == pytest.approx(0.07, abs=0.02)


@pytest.mark.parametrize("tasks", [3, 5, 12])
def test_it_is_not_sure_without_reason(tasks: int) -> None:
    """No difference: a verdict in about one of ten worlds at most, however few the tasks."""
    verdicts = [compared(everywhere(world(0.0, tasks=tasks, seed=seed))).pairs[0] for seed in range(100)]
    assert sum(not pair.verdict.startswith("cannot tell") for pair in verdicts) <= 18
    assert 0.3 < np.mean([pair.p_first_better for pair in verdicts]) < 0.7


def test_many_pairs_are_no_reason_either() -> None:
    """Five strategies that are all alike on three domains: thirty pairs, and hardly a report with a verdict."""
    reports = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        outcomes = [
            Outcome("", f"way {way}", f"task {n}", f"domain {n % 3}", float(level + 0.03 * random.normal()), 0.01, 1.0)
            for n, level in enumerate(random.uniform(0.3, 0.9, 18))
            for way in range(5)
        ]
        pairs = compared(outcomes).pairs
        sure = [pair for pair in pairs if not pair.verdict.startswith("cannot tell")]
        assert len(pairs) == 40 and all(pair.low * pair.high > 0 for pair in sure)
        reports += bool(sure)
    assert reports <= 9


def everywhere(outcomes: list[Outcome]) -> list[Outcome]:
    """All of one domain: one pair is compared."""
    return [replace(outcome, domain="texts") for outcome in outcomes]


def test_few_tasks_and_repeats_of_one_task_prove_nothing() -> None:
    few = [o for o in world(0.5) if o.task in ("task 1", "task 3")]
    (pair,) = compared(few * 20).pairs
    assert pair.verdict == "cannot tell from 2 tasks"
    only = compared([o for o in few if o.strategy == "portfolio"])
    assert only.pairs == [] and only.strategies[0].tasks == 2


def test_where_there_is_nothing_it_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metapeft.tracking.selections.selections", lambda settings, runs: compared([]))
    assert cli.main(["compare", "--by", "selection"]) == 0
    assert capsys.readouterr().out.count("nothing yet") == 1


def test_from_recorded_runs(settings: Settings, task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        here = replace(task, name=f"task{number}", family="texts")
        for strategy, value in (("portfolio", 0.70), ("experience", 0.78)):
            trial = replace(make_trial(number + 1), id=f"{strategy}{number}", task=here.name)
            trial.score = Score("accuracy", value + number / 50, 0.01, 300, 0.3)
            better = replace(trial, id=f"better{strategy}{number}", score=replace(trial.score, value=0.9))
            with tracking.run(settings, here.name) as tracker:
                tracker.log_task(here)
                tracker.log_trial(better, here)
                tracker.log_outcome(trial)
                tracker.set_tags({"selection": strategy})
    found = selections(settings)
    assert [(s.strategy, s.tasks, s.runs) for s in found.strategies] == [("experience", 4, 4), ("portfolio", 4, 4)]
    assert found.strategies[0].regret == pytest.approx(0.9 - 0.78 - 0.03)
    assert {o.domain for o in found.outcomes} == {"texts"}
    (pair,) = found.pairs
    assert pair.verdict == "experience is better" and pair.difference == pytest.approx(0.08)
    picture = tmp_path / "out" / "selections.png"
    assert cli.main(["compare", "--by", "selection", "--plot", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["tasks"] == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["compare", "--by", "selection"]) == 0
    assert "experience is better" in capsys.readouterr().out
    assert cli.main(["compare", "--plot", str(picture)]) == 2


def test_only_scores_by_one_metric_are_compared(settings: Settings, task: Task) -> None:
    for strategy, metric in (("portfolio", "accuracy"), ("experience", "macro_f1")):
        trial = replace(make_trial(1), id=strategy)
        trial.score = Score(metric, 0.9 if metric == "accuracy" else 0.6, 0.01, 300, 0.3)
        with tracking.run(settings, strategy) as tracker:
            tracker.log_task(task)
            tracker.log_outcome(trial)
            tracker.set_tags({"selection": strategy})
    found = selections(settings)
    assert len(found.outcomes) == 2 and found.pairs == []
