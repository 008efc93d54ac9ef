"""Real MLflow on real SQLite: what was logged is there, runs continue in other processes, and creation is safe."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from metapeft import tracking
from metapeft.data.task import Task
from metapeft.errors import MetapeftError, UserError
from metapeft.settings import Settings, home, load_settings
from metapeft.tracking import client, exchange
from metapeft.tracking.client import connect, uri
from tests.tracking.made import make_trial


@dataclass
class Record:
    """Anything with the JSON of a profile or a recommendation."""

    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.record


ROOT = Path(__file__).parents[2]
PROFILE = Record(
    {"version": "1", "features": {"examples": 12.0, "zero_shot_loss": 2.5}, "names": ["a"], "embedding": [0.5]}
)
RECOMMENDATION = Record(
    {
        "task": "sms_spam",
        "basis": "portfolio",
        "recommendations": [
            {
                "rank": 1,
                "method": "lora",
                "configuration": {"method": "lora", "learning_rate": 1e-3},
                "score": {"mean": 0.8, "low": 0.5, "high": 0.95, "level": 0.9},
                "p_best": 0.3,
                "p_within_1pct": 0.4,
                "seconds": 100.0,
                "peak_memory_mb": 1200.0,
                "adapter_bytes": 1000,
            }
        ],
        "neighbours": [],
    }
)


def test_a_run_holds_task_profile_recommendation_and_trials(settings: Settings, task: Task) -> None:
    good, bad = make_trial(1), make_trial(2, status="diverged", score=None, error="loss is NaN", untuned_score=None)
    bad.curve[0]["train_loss"] = math.nan
    with tracking.run(settings, "demo", {"purpose": "test"}) as tracker:
        tracker.log_task(task)
        tracker.log_profile(PROFILE)
        tracker.log_recommendation(RECOMMENDATION)
        first = tracker.log_trial(good, task)
        assert tracker.log_trial(good, task) == first  # once is enough
        second = tracker.log_trial(bad, task)
        tracker.log_outcome(good)
        tracker.log_decision(RECOMMENDATION, PROFILE, good)

    client = connect(settings.tracking)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "demo"
    tags = run.data.tags
    assert tags["task"] == "sms_spam" and tags["task_version"] == task.version and tags["dvc_id"] == task.dvc_id
    assert tags["backbone"] == settings.backbone and tags["purpose"] == "test" and tags["basis"] == "portfolio"
    assert tags["recommended_method"] == "lora"
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("sms_spam", task.version)
    assert json.loads(dataset.dataset.profile) == {"train": 8, "validation": 2, "test": 2}
    assert run.data.metrics["profile.zero_shot_loss"] == 2.5
    assert run.data.metrics["recommended.score"] == 0.8
    assert run.data.metrics["score"] == 0.9 and run.data.metrics["score_standard_error"] == 0.02
    assert run.data.params["learning_rate"] == "0.001"
    assert run.data.metrics["decision.error"] == pytest.approx(0.1) and run.data.metrics["decision.inside_90"] == 1
    assert run.data.metrics["decision.rank"] == 1 and "decision.inside_80" not in run.data.metrics
    root = home() / "mlartifacts" / tracker.run_id / "artifacts"
    assert json.loads((root / "decision.json").read_text())["embedding"] == [0.5]
    assert json.loads((root / "profile.json").read_text()) == PROFILE.record
    assert json.loads((root / "recommendation.json").read_text())["basis"] == "portfolio"

    trial_run = client.get_run(first)
    assert trial_run.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert trial_run.data.params["targets"] == '["q_proj", "v_proj"]'
    assert trial_run.data.metrics["untuned_score"] == 0.5
    losses = client.get_metric_history(first, "curve.train_loss")
    assert [(m.step, m.value) for m in losses] == [(10, 1.5), (20, 0.75)]
    assert losses[1].timestamp - trial_run.info.start_time == 6000
    assert [m.step for m in client.get_metric_history(first, "curve.validation_score")] == [20]
    assert trial_run.info.end_time - trial_run.info.start_time == 12_000

    failed = client.get_run(second)
    assert failed.info.status == "FAILED" and failed.data.tags["status"] == "diverged"
    assert failed.data.tags["error"] == "loss is NaN" and "score" not in failed.data.metrics
    assert math.isnan(client.get_metric_history(second, "curve.train_loss")[0].value)
    assert len(client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{tracker.run_id}'")) == 2


def test_what_a_kill_kept_from_the_run_is_recorded_later_and_what_another_run_holds_is_not(
    settings: Settings, task: Task
) -> None:
    with tracking.run(settings, "one") as first:
        first.log_trial(make_trial(1), task)
    with tracking.run(settings, "two") as second:
        second.log_trial(make_trial(2), task)
        for _ in range(2):
            second.log_missing([make_trial(1), make_trial(2), make_trial(3)], task)
    client = connect(settings.tracking)
    found = client.search_runs([client.get_run(second.run_id).info.experiment_id], "tags.trial_id != ''")
    held = sorted((r.data.tags["mlflow.parentRunId"] == second.run_id, r.data.tags["trial_id"]) for r in found)
    assert held == sorted([(False, make_trial(1).id), (True, make_trial(2).id), (True, make_trial(3).id)])


def test_a_test_score_that_was_measured_later_is_added(settings: Settings, task: Task) -> None:
    later = make_trial(1)
    with tracking.run(settings, "sweep") as tracker:
        run_id = tracker.log_trial(replace(later, score=None), task)
        assert "score" not in connect(settings.tracking).get_run(run_id).data.metrics
        assert tracker.log_trial(later, task) == run_id
    assert connect(settings.tracking).get_run(run_id).data.metrics["score"] == 0.9
    (found,) = exchange.collect(settings)
    assert found["score"]["value"] == 0.9 and exchange.publish(settings, [later]) == 0


def test_what_went_wrong_is_not_hidden_by_a_store_that_is_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def lost(*_: Any, **__: Any) -> None:
        raise MlflowException("connection lost")

    with pytest.raises(UserError, match="a lower learning rate"), tracking.run(settings, "x"):
        monkeypatch.setattr(MlflowClient, "set_tag", lost)
        monkeypatch.setattr(MlflowClient, "set_terminated", lost)
        raise UserError("train needs a lower learning rate")
    assert "connection lost" in capsys.readouterr().err


def test_a_database_that_another_process_writes_is_not_called_damaged(no_database: Settings, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "busy.db", isolation_level=None) as database:
        database.execute("create table one (n)")
        database.execute("begin exclusive")
        with pytest.raises(MetapeftError, match="try again") as busy:
            connect(load_settings(tracking={"uri": "sqlite:///busy.db"}).tracking)
    assert busy.value.exit_code == 1


def test_the_file_of_an_sqlite_address(tmp_path: Path) -> None:
    assert client._file("sqlite:///a/b.db") == Path("a/b.db")
    assert client._file(f"sqlite+pysqlite:///{tmp_path}/b.db") == tmp_path / "b.db"
    for nowhere in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(UserError, match="names no file"):
            client._file(nowhere)


def test_long_curves_are_kept_whole(settings: Settings) -> None:
    curve = [{"step": n, "seconds": n / 10, "train_loss": 1 / (n + 1)} for n in range(1500)]
    with tracking.run(settings, "long") as tracker:
        run_id = tracker.log_trial(make_trial(curve=curve, configuration={f"key{n}": n for n in range(150)}))
    client = connect(settings.tracking)
    assert len(client.get_metric_history(run_id, "curve.train_loss")) == 1500
    assert len(client.get_run(run_id).data.params) >= 150


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("bad file"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(2), "KILLED"),
    ],
)
def test_how_a_run_ends(settings: Settings, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), tracking.run(settings, "ends") as tracker:
        raise error
    run = connect(settings.tracking).get_run(tracker.run_id)
    assert run.info.status == status
    assert ("bad file" in run.data.tags.get("error", "")) == (status == "FAILED")


CONTINUE = """
import sys
from metapeft import tracking
from metapeft.settings import load_settings
with tracking.run(load_settings(), "ignored", {"stage": "second"}) as tracker:
    tracker.log_metrics({"second": 2})
    print(tracker.run_id)
"""


def test_another_process_continues_the_run(settings: Settings) -> None:
    with tracking.run(settings, "pipeline", {"stage": "first"}) as tracker:
        tracker.log_metrics({"first": 1})
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE],
        env={**os.environ, "MLFLOW_RUN_ID": tracker.run_id},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == tracker.run_id
    assert done.stderr == ""  # no chatter of MLflow or alembic
    run = connect(settings.tracking).get_run(tracker.run_id)
    assert run.data.metrics == {"first": 1.0, "second": 2.0} and run.data.tags["stage"] == "second"
    assert run.info.run_name == "pipeline" and run.info.status == "FINISHED"


RACE = """
import sys
from metapeft import tracking
from metapeft.settings import load_settings
with tracking.run(load_settings(), sys.argv[1]) as tracker:
    for n in range(40):
        tracker.log_metrics({f"m{n}": n})
"""


def test_processes_that_start_at_once_share_one_new_database(no_database: Settings) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, f"run{n}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "", "")
    client = connect(no_database.tracking)
    runs = client.search_runs([client.get_experiment_by_name("metapeft").experiment_id])
    assert len(runs) == 2 and all(len(run.data.metrics) == 40 for run in runs)
    assert [p.name for p in home().glob(".*.tmp*")] == []


def test_two_homes_share_one_new_database(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, f"run{n}"],
            cwd=ROOT,
            env={
                **os.environ,
                "METAPEFT_HOME": str(tmp_path / f"home{n}"),
                "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/shared.db",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in started] == [("", 0)] * 2
    assert [p.name for p in tmp_path.glob(".*.tmp*")] == []


def test_an_interrupted_creation_leaves_no_broken_database(no_database: Settings) -> None:
    process = subprocess.Popen([sys.executable, "-c", RACE, "killed"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (home() / ".mlflow.db.tmp").exists():
        assert process.poll() is None, "too fast to be killed half-way"
    process.kill()
    process.wait()
    assert not (home() / "mlflow.db").exists()
    with tracking.run(no_database, "after"):
        pass
    assert (home() / "mlflow.db").exists() and list(home().glob(".*.tmp*")) == []


def test_where_runs_go(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert uri(settings.tracking) == f"sqlite:///{tmp_path / 'home with space' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.test")
    assert uri(settings.tracking) == "http://tracking.test"
    chosen = load_settings(tracking={"uri": "sqlite:///own.db", "experiment": "mine"})
    assert uri(chosen.tracking) == "sqlite:///own.db"
    with tracking.run(chosen, "here"):
        pass
    assert (tmp_path / "own.db").exists()


def test_bad_stores_and_runs(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**options: Any) -> None:
        with tracking.run(load_settings(tracking=options), "bad"):
            pass

    with pytest.raises(UserError, match="not supported"):
        start(uri="file:///tmp/mlruns")
    (tmp_path / "text.db").write_text("this is not a database, whatever its name says" * 50)
    with pytest.raises(UserError, match="not a usable SQLite database"):
        start(uri="sqlite:///text.db")
    with pytest.raises(UserError, match="cannot use the tracking store"):
        start(uri="mssql+nothing://host/name")
    with pytest.raises(MetapeftError, match="does not answer") as away:
        start(uri="http://127.0.0.1:9")
    assert away.value.exit_code == 1, "an outage is no bad input: Airflow tries again"
    with pytest.raises(UserError, match="no MLflow run nothing"), tracking.run(settings, "x", run_id="nothing"):
        pass
    with tracking.run(settings, "y") as tracker:
        tracker.log_outcome(make_trial(1))
        with pytest.raises(MetapeftError, match=r"refused.*param"):
            tracker.log_outcome(make_trial(2, seed=7))
    client = connect(settings.tracking)
    client.delete_experiment(client.get_experiment_by_name("metapeft").experiment_id)
    with pytest.raises(UserError, match="was deleted"):
        start()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="METAPEFT_HOME"):
        start()


def test_an_outdated_database_says_how_to_upgrade(settings: Settings) -> None:
    import sqlite3

    with tracking.run(settings, "x"):
        pass
    other = home() / "old.db"
    with sqlite3.connect(home() / "mlflow.db") as source, sqlite3.connect(other) as target:
        source.backup(target)
        target.execute("update alembic_version set version_num = '451aebb31d03'")
    with pytest.raises(UserError, match="mlflow db upgrade"):
        connect(replace_uri(settings, f"sqlite:///{other}").tracking)


def replace_uri(settings: Settings, where: str) -> Settings:
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": where})})


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = "import sys, metapeft.tracking, metapeft.tracking.models; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert replace(make_trial(), seed=1).seed == 1


def test_a_run_tells_how_busy_the_machine_was(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when another process continues it: the steps go on."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.3")
    name, run_id = "system/cpu_utilization_percentage", None
    lengths = []
    for _ in range(2):
        with tracking.run(settings, "busy", run_id=run_id) as tracker:
            time.sleep(1.5)
        run_id = tracker.run_id
        history = tracker.client.get_metric_history(run_id, name)
        lengths.append(len(history))
    assert 0 < lengths[0] < lengths[1]
    assert sorted(point.step for point in history) == list(range(lengths[1]))
    assert tracker.client.get_run(run_id).data.metrics["system/system_memory_usage_megabytes"] > 0
