"""A real shadow trial: the runner-up is trained beside what somebody trained, and regret is known."""

from __future__ import annotations

from pathlib import Path

import metapeft
from metapeft import backbones
from metapeft.api import decided
from metapeft.meta import Experience, decisions
from metapeft.monitoring.outcomes import joined
from metapeft.training.session import Session
from metapeft.training.trainer import run_trial
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file


def test_a_shadow_trial_makes_regret_known(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("data: {max_train: 24, max_validation: 8, max_test: 16}\ntrain: {steps: 2}\n")
    backbone = str(tiny_folder("llama"))
    found = metapeft.recommend(spam_file(tmp_path), backbone=backbone, params=params)
    (entry,) = decisions.read()
    assert entry["steps"] == 2
    task = decided(entry)
    assert task is not None and task.version == found.task_version
    first = found.recommendations[0].configuration
    done = run_trial(Session(backbones.load(backbone), task), first, steps=2)
    Experience().append(done)

    report = metapeft.monitor(shadow=2, estimate=False, params=params)
    assert report.decisions == report.joined == report.compared == 1 and report.healthy
    ours = [t for t in Experience().trials() if t.task_version == task.version]
    assert len(ours) == 2 and {(t.budget, t.seed) for t in ours} == {(2, done.seed)}
    (decision,) = joined([entry], ours)
    assert decision.regret is not None and decision.kind.tried == 2 and decision.kind.near
    again = metapeft.monitor(shadow=2, estimate=False, params=params)
    assert again.compared == 1 and len([t for t in Experience().trials() if t.task_version == task.version]) == 2
    assert decided(entry | {"task_version": "0" * 16}) is None, "rows that are gone cannot be trained on"
