"""Trials to MLflow and back: whole, and once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from metapeft import tracking
from metapeft.cli import main
from metapeft.meta.experience import Experience
from metapeft.settings import Settings
from metapeft.tracking import exchange
from metapeft.tracking.client import connect, uri
from metapeft.training.trial import Score, Trial
from tests.tracking.made import make_trial


def long(number: int) -> Trial:
    """A trial whose record needs several tags."""
    curve = [{"step": step, "train_loss": 1 / (step + 1)} for step in range(400)]
    return make_trial(number, curve=curve)


def test_a_record_survives_tags_and_a_torn_one_is_none() -> None:
    for trial in (make_trial(1), long(2)):
        tags = exchange.tags(trial)
        assert all(len(value) <= exchange.PIECE for value in tags.values())
        assert Trial.from_json(exchange.record({**tags, "other": "x"}) or {}) == trial
    assert len(tags) > 2
    del tags["trial.1"]
    assert exchange.record(tags) is None and exchange.record({}) is None


def test_publish_and_collect(settings: Settings, tmp_path: Path) -> None:
    here = Experience(tmp_path / "here", shipped=None)
    here.extend([make_trial(1), long(2), make_trial(3, score=Score("accuracy", 0.1, 0.01, 10, math.nan))])
    assert exchange.publish(settings, here.trials()) == 3
    assert exchange.publish(settings, here.trials()) == 0
    with tracking.run(settings, "a sweep") as tracker:  # runs of trials that the pipeline itself records
        tracker.log_trial(make_trial(4))
        tracker.log_trial(make_trial(1))
    there = Experience(tmp_path / "there", shipped=None)
    assert there.add(exchange.collect(settings)) == 4
    assert there.add(exchange.collect(settings)) == 0
    assert {t.id: t for t in there.trials()}[make_trial(4).id] == make_trial(4)
    assert repr([t for t in there.trials() if t.id != make_trial(4).id]) == repr(here.trials())  # NaN is not NaN
    runs = connect(settings.tracking).search_runs(["1"], f"tags.trial_id = '{make_trial(1).id}'")
    assert len(runs) == 2 and all(r.data.metrics["score"] == 0.9 for r in runs)


def test_the_commands(
    settings: Settings, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(settings.tracking))
    Experience().extend([make_trial(1), make_trial(2)])

    def run(*words: str) -> dict[str, object]:
        assert main(["experience", *words, "--json"]) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    assert run("export", "mlflow") == {"trials": 2, "to": "mlflow"}
    assert run("export", "mlflow") == {"trials": 0, "to": "mlflow"}
    monkeypatch.setenv("METAPEFT_HOME", str(home / "another"))
    assert run("import", "mlflow") == {"trials": 2, "from": "mlflow"}
    assert run("import", "mlflow") == {"trials": 0, "from": "mlflow"}
