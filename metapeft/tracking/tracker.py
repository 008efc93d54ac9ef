"""Recording a run in MLflow: the task, its profile, the recommendation, every trial, and the adapter that came of it.

Within `run` everything is written at once; a process that dies loses nothing that was logged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from metapeft.data.task import Task
from metapeft.errors import MetapeftError, UserError
from metapeft.progress import say
from metapeft.settings import Settings, shown
from metapeft.tracking import exchange
from metapeft.tracking.client import connect, experiment_id, failures, uri
from metapeft.tracking.decision import joined
from metapeft.training.trial import Score, Trial

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from metapeft.tracking.models import Registration

RUN_ID = "MLFLOW_RUN_ID"  # the environment variable that MLflow itself uses to continue a run in another process
STATUS = {"ok": "FINISHED", "stopped": "KILLED", "diverged": "FAILED", "out_of_memory": "FAILED", "failed": "FAILED"}
_OUTCOME = ("seconds", "train_seconds", "peak_memory_mb", "tokens", "trained_parameters", "adapter_bytes")
_BATCH = 1000  # metrics per request that MLflow accepts
_PARAMS = 100


class Json(Protocol):
    """A profile or a recommendation: what matters here is its JSON."""

    def to_json(self) -> dict[str, Any]: ...


@contextmanager
def run(
    settings: Settings, name: str, tags: Mapping[str, str] | None = None, run_id: str | None = None
) -> Iterator[Tracker]:
    """One MLflow run for one command or pipeline.

    run_id, or MLFLOW_RUN_ID in the environment, continues a run that another process began. The run ends FINISHED,
    FAILED (with the error as a tag) or KILLED. Raises UserError when the store or the run cannot be used.
    """
    client = connect(settings.tracking)
    with failures(settings.tracking):
        run_id = run_id or os.environ.get(RUN_ID)
        if run_id is None:
            all_tags = {**_about(), "backbone": settings.backbone, **(tags or {})}
            run_id = client.create_run(
                experiment_id(client, settings.tracking), tags=all_tags, run_name=name
            ).info.run_id
        else:
            _continue(client, run_id, tags or {})
    tracker = Tracker(client, settings, run_id)
    status = "FINISHED"
    try:
        with _system_metrics(client, run_id):
            yield tracker
    except (KeyboardInterrupt, SystemExit) as stop:
        status = "FINISHED" if isinstance(stop, SystemExit) and not stop.code else "KILLED"
        raise
    except BaseException as error:
        status = "FAILED"
        with _noted(settings):
            client.set_tag(run_id, "error", " ".join(f"{type(error).__name__}: {error}".split())[:5000])
        raise
    finally:
        with failures(settings.tracking) if status == "FINISHED" else _noted(settings):
            client.set_terminated(run_id, status)


@contextmanager
def _noted(settings: Settings) -> Iterator[None]:
    """What MLflow refuses while an error is under way is said, and does not take its place."""
    try:
        with failures(settings.tracking):
            yield
    except MetapeftError as refused:
        say(f"the run's end was not recorded: {refused}")


@dataclass(frozen=True)
class Tracker:
    """An MLflow run being written. Everything may be logged again with the same content."""

    client: MlflowClient
    settings: Settings
    run_id: str

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Values become text; None and "" are left out."""
        with failures(self.settings.tracking):
            _write(self.client, self.run_id, tags=tags)

    def log_task(self, task: Task) -> None:
        """The dataset as an input (its digest is the content version), and its identity as tags."""
        with failures(self.settings.tracking):
            _log_input(self.client, self.run_id, task)
            _write(self.client, self.run_id, tags=identity(task))

    def log_profile(self, profile: Json) -> None:
        """`profile.json` holds everything, with the embedding; every feature is a metric `profile.NAME`."""
        record = profile.to_json()
        self.log_json(record, "profile.json")
        metrics = {f"profile.{name}": value for name, value in record["features"].items()}
        with failures(self.settings.tracking):
            _write(self.client, self.run_id, metrics=metrics, tags={"profile_version": record["version"]})

    def log_recommendation(self, recommendation: Json) -> None:
        """`recommendation.json`, and its basis and first choice as tags."""
        record = recommendation.to_json()
        self.log_json(record, "recommendation.json")
        tags: dict[str, Any] = {"basis": record["basis"], "recommendation_id": record.get("id")}
        metrics = {}
        if record["recommendations"]:
            first = record["recommendations"][0]
            tags |= {"recommended_method": first["method"], "recommended_configuration": first["configuration"]}
            metrics = {f"recommended.{key}": first[key] for key in ("seconds", "peak_memory_mb", "p_best")}
            metrics["recommended.score"] = first["score"]["mean"]
        with failures(self.settings.tracking):
            _write(self.client, self.run_id, metrics=metrics, tags=tags)

    def log_trial(self, trial: Trial, task: Task | None = None, *, experience: bool = True) -> str:
        """A nested run with the configuration, the learning curve and the outcome; returns its run id.

        A trial that this run holds already is not recorded twice; a test score that was measured since is added to it.
        experience: whether others may learn from it; not where a configuration alone does not make this outcome again.
        """
        with failures(self.settings.tracking):
            parent = self.client.get_run(self.run_id).info
            query = f"tags.trial_id = '{trial.id}' and tags.mlflow.parentRunId = '{self.run_id}'"
            found = self.client.search_runs([parent.experiment_id], query, max_results=1)
            if found and found[0].info.status != "RUNNING":
                run_id = str(found[0].info.run_id)
                if trial.score is not None and "score" not in found[0].data.metrics:
                    _write_outcome(self.client, run_id, trial, experience)
                return run_id
            started = _milliseconds(trial.started)
            tags = {**_about(), "mlflow.parentRunId": self.run_id, "trial_id": trial.id}
            name = f"{trial.method}-{trial.id[:6]}"
            nested = found[0] if found else self.client.create_run(parent.experiment_id, started, tags, name)
            run_id = str(nested.info.run_id)
            if task is not None:
                _log_input(self.client, run_id, task)
                _write(self.client, run_id, tags=identity(task))
            _write_outcome(self.client, run_id, trial, experience)
            ended = int(started + 1000 * trial.seconds)
            self.client.set_terminated(run_id, STATUS[trial.status], ended)
            return run_id

    def log_missing(self, trials: Iterable[Trial], task: Task | None = None) -> None:
        """`log_trial` for those that no run of the experiment holds."""
        for trial in trials:
            with failures(self.settings.tracking):
                parent = self.client.get_run(self.run_id).info
                query = f"tags.trial_id = '{trial.id}' and attributes.status != 'RUNNING'"
                held = self.client.search_runs([parent.experiment_id], query, max_results=1)
            if not held:
                self.log_trial(trial, task)

    def url(self) -> str:
        """Where a browser finds the run: METAPEFT_MLFLOW_URL is MLflow's address for people, where that is another one
        ("" for a database without a server)."""
        where = os.environ.get("METAPEFT_MLFLOW_URL") or shown(uri(self.settings.tracking))
        if not where.startswith(("http://", "https://")):
            return ""
        with failures(self.settings.tracking):
            experiment = self.client.get_run(self.run_id).info.experiment_id
        return f"{where.rstrip('/')}/#/experiments/{experiment}/runs/{self.run_id}"

    def log_settings(self) -> None:
        """`settings.json`: what the run was asked for, as `metapeft models restore` reads it."""
        record = self.settings.model_dump(mode="json")
        record["tracking"]["uri"] = None  # it may hold a password, and is this machine's
        self.log_json(record, "settings.json")

    def log_outcome(self, trial: Trial) -> None:
        """What this run came to: the trial's configuration, curve and scores, on the run itself."""
        with failures(self.settings.tracking):
            _write_outcome(self.client, self.run_id, trial)

    def log_decision(self, recommendation: Json, profile: Json, trial: Trial) -> None:
        """`decision.json` (see `metapeft.tracking.decision`), and what search needs of it as metrics `decision.…`."""
        record = joined(recommendation.to_json(), profile.to_json(), trial)
        self.log_json(record, "decision.json")
        numbers = {name: record[name] for name in ("error", "inside_80", "inside_90")}
        numbers["rank"] = record["chosen"]["rank"]
        metrics = {f"decision.{name}": float(value) for name, value in numbers.items() if value is not None}
        with failures(self.settings.tracking):
            _write(self.client, self.run_id, metrics=metrics, tags={"meta_model": record["meta_model"]})

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        with failures(self.settings.tracking):
            _write(self.client, self.run_id, metrics=metrics)

    def log_json(self, value: Any, name: str) -> None:
        with failures(self.settings.tracking):
            self.client.log_text(self.run_id, json.dumps(value, indent=2, ensure_ascii=False), name)

    def register(
        self, adapter: Path, trial: Trial, task: Task, recommendation: Json | None = None, alias: str = "champion"
    ) -> Registration:
        """Put a trained adapter into the registry; see `metapeft.tracking.models.register`."""
        from metapeft.tracking.models import register

        return register(self.client, self.settings, self.run_id, adapter, trial, task, recommendation, alias)


def identity(task: Task) -> dict[str, str]:
    """The tags that say which data this is."""
    return {
        "task": task.name,
        "task_version": task.version,
        "dvc_id": task.dvc_id,
        "task_kind": task.kind,
        "family": task.family,
        "metric": task.metric,
    }


@contextmanager
def _system_metrics(client: MlflowClient, run_id: str) -> Iterator[None]:
    """CPU, memory, disk, network and GPU of this machine, every 10 s, as metrics `system/…` of the run."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=client.tracking_uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _continue(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        raise UserError(f"there is no MLflow run {run_id} to continue; check the id and the tracking uri") from error
    if info.lifecycle_stage == "deleted":
        raise UserError(f"MLflow run {run_id} was deleted; start a new one or restore it in MLflow")
    client.update_run(run_id, status="RUNNING")
    _write(client, run_id, tags=tags)


def _about() -> dict[str, str]:
    """Tags of every run: who made it, with which metapeft, from which commit."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "metapeft", "mlflow.source.type": "LOCAL"}
    with suppress(metadata.PackageNotFoundError):
        tags["metapeft_version"] = metadata.version("metapeft")
    if user := os.environ.get("USER") or os.environ.get("LOGNAME"):
        tags["mlflow.user"] = user
    with suppress(OSError, subprocess.TimeoutExpired):  # no git here
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
        if done.returncode == 0:
            tags["mlflow.source.git.commit"] = tags["git_commit"] = done.stdout.strip()
            changes = ["git", "status", "--porcelain", "--untracked-files=no"]
            done = subprocess.run(changes, capture_output=True, text=True, timeout=10, check=False)
            tags["git_dirty"] = "true" if done.stdout.strip() else "false"
    return tags


def _log_input(client: MlflowClient, run_id: str, task: Task) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    sizes = {name: len(task.split(name)) for name in ("train", "validation", "test")}
    source = {"tags": {"source": task.source, "licence": task.licence, "dvc_id": task.dvc_id}}
    dataset = Dataset(task.name[:500], task.version, "code", json.dumps(source), profile=json.dumps(sizes))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _write_outcome(client: MlflowClient, run_id: str, trial: Trial, experience: bool = True) -> None:
    params = {**trial.configuration, "method": trial.method, "seed": trial.seed, "budget": trial.budget}
    params |= {"train_examples": trial.train_examples, "device": trial.device}
    metrics: dict[str, float] = {name: getattr(trial, name) for name in _OUTCOME}
    for name in ("score", "validation", "untuned_score"):
        metrics |= _score(name, getattr(trial, name))
    tags = {
        "task": trial.task,
        "task_version": trial.task_version,
        "backbone": trial.backbone,
        "method": trial.method,
        "status": trial.status,
        "trial_id": trial.id,
        "error": trial.error,
        "metric": trial.score.metric if trial.score else "",
    }
    if experience:
        tags |= exchange.tags(trial)
    _write(client, run_id, metrics=metrics, params=params, tags=tags)
    _write_curve(client, run_id, trial.curve, _milliseconds(trial.started))


def _score(name: str, score: Score | None) -> dict[str, float]:
    if score is None:
        return {}
    values = {name: score.value, f"{name}_standard_error": score.standard_error, f"{name}_loss": score.loss}
    return {**values, f"{name}_examples": score.n}


def _write_curve(client: MlflowClient, run_id: str, curve: Iterable[Mapping[str, Any]], started: int) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(f"curve.{key}", float(value), started + int(1000 * (row.get("seconds") or 0)), int(row.get("step") or 0))
        for row in curve
        for key, value in row.items()
        if key != "step" and value is not None
    ]
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])


def _write(
    client: MlflowClient,
    run_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    numbers = [Metric(key, float(value), now, 0) for key, value in (metrics or {}).items()]
    names = [Param(key, _text(value)) for key, value in (params or {}).items()]
    texts = [RunTag(key, _text(value)) for key, value in (tags or {}).items() if value not in (None, "")]
    while numbers or names or texts:
        client.log_batch(run_id, numbers[: _BATCH - 2 * _PARAMS], names[:_PARAMS], texts[:_PARAMS])
        numbers, names, texts = numbers[_BATCH - 2 * _PARAMS :], names[_PARAMS:], texts[_PARAMS:]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _milliseconds(started: str) -> int:
    return int((datetime.fromisoformat(started).timestamp() if started else time.time()) * 1000)
