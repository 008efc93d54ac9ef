"""Rows for `metapeft compare`: what recorded runs came to, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from metapeft.errors import UserError
from metapeft.settings import Settings
from metapeft.tracking.client import connect, failures

if TYPE_CHECKING:
    from mlflow.entities import Run

_TAGS = ("task", "task_version", "backbone", "method", "status", "metric")
_METRICS = (
    "score",
    "score_standard_error",
    "score_loss",
    "validation",
    "validation_standard_error",
    "untuned_score",
    "seconds",
    "peak_memory_mb",
    "trained_parameters",
    "adapter_bytes",
)


def compare(settings: Settings, runs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per outcome, best score first within each task.

    `runs` are run ids (of trials, or of pipelines: then of their trials too), run names or experiment names; none means
    the experiment of the settings. A trial that was recorded in several runs counts once. Raises UserError for a name
    that is nothing of these.
    """
    client = connect(settings.tracking)
    rows: dict[str, dict[str, Any]] = {}

    def order(row: dict[str, Any]) -> tuple[bool, bool, str]:  # a kill leaves a run without an outcome
        return not row["status"], row["score"] is None, row["started"]

    for run in chosen(settings, client, runs):
        if "trial_id" in run.data.tags:
            row = _row(run)
            known = rows.get(row["trial"])
            if known is None or order(known) > order(row):
                rows[row["trial"]] = row
    return sorted(rows.values(), key=lambda r: (r["task"], r["task_version"], -_measured(r), r["seconds"] or 0))


def chosen(settings: Settings, client: Any, runs: Sequence[str]) -> list[Run]:
    """The MLflow runs that these names mean; see `compare`."""
    found: dict[str, Run] = {}
    with failures(settings.tracking):
        experiments = {e.name: e.experiment_id for e in client.search_experiments()}
        for name in runs or [settings.tracking.experiment]:
            if name in experiments:
                known = _search(client, [experiments[name]], "")
            else:
                known = _named(client, list(experiments.values()), name)
            if not known and runs:
                raise UserError(
                    f"{name!r} is no run id, run name or experiment in MLflow; see the ids with `metapeft compare`"
                )
            found |= {run.info.run_id: run for run in known}
    return list(found.values())


def _named(client: Any, experiments: list[str], name: str) -> list[Run]:
    quoted = f"'{name}'" if "'" not in name else '"' + name.replace('"', "") + '"'
    chosen = _search(client, experiments, f"attributes.run_name = {quoted}")
    if name.isalnum():
        chosen += _search(client, experiments, f"attributes.run_id = '{name}'")
    parents = [run.info.run_id for run in chosen]
    for parent in parents:
        chosen += _search(client, experiments, f"tags.mlflow.parentRunId = '{parent}'")
    return chosen


def _search(client: Any, experiments: list[str], query: str) -> list[Run]:
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs(experiments, query, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _row(run: Run) -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    return {
        "trial": tags["trial_id"],
        "run": run.info.run_id,
        "name": run.info.run_name,
        **{key: tags.get(key, "") for key in _TAGS},
        **{key: metrics.get(key) for key in _METRICS},
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
    }


def _measured(row: dict[str, Any]) -> float:
    """The test score, the validation score where the test split was not scored; -1 without any."""
    known = [value for value in (row["score"], row["validation"]) if value is not None and value == value]
    return known[0] if known else -1.0
