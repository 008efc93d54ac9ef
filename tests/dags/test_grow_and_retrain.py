"""The DAG that grows the experience and retrains, run in a project of its own on one small task and a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import pytest

from metapeft.data import versions as data_versions
from metapeft.meta import versions
from metapeft.meta.experience import Experience
from tests.backbones.tiny import tiny_folder
from tests.dags.conftest import run
from tests.stages.made import spam_file


def test_a_backbone_that_does_not_exist_fails_at_once(airflow_home: Path, project: Path) -> None:
    conf = {"backbone": str(project / "nothing"), "tasks": [str(spam_file(project / "data"))]}
    states = run(project, "grow_and_retrain", run_conf=conf)
    assert states["grow", -1] == ("failed", 1), "wrong input must not be tried again"
    assert {state for (task, _), (state, _) in states.items() if task != "grow"} == {"upstream_failed"}


@pytest.mark.slow
def test_trials_are_added_a_model_competes_and_both_are_versioned(
    airflow_home: Path, project: Path, home: Path
) -> None:
    conf = {"tasks": [str(spam_file(project / "data"))], "backbone": str(tiny_folder("llama")), "max_seconds": 90}
    states = {task: state for (task, _), (state, _) in run(project, "grow_and_retrain", run_conf=conf).items()}
    assert states.pop("promoted") in ("success", "skipped")
    assert set(states.values()) == {"success"}, states
    trials = Experience(shipped=None).trials()
    assert trials and {trial.task for trial in trials} == {"spam"}
    assert [version.number for version in versions.versions()] == [0, 1]
    identity = data_versions.tracked(project / "knowledge")
    assert identity and (project.parent / "remote/files/md5" / identity[:2] / identity[2:]).exists()
