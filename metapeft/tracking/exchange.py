"""Trials from and to MLflow: every run of a trial carries the whole record in its tags, so nothing is lost on the way.

A tag holds a few thousand characters at most: a longer record is cut into `trial.0`, `trial.1`, …
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from metapeft.files import finite
from metapeft.settings import Settings
from metapeft.tracking.client import connect, failures
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TAG = "trial"
PIECE = 4000  # characters; MLflow takes 5000 to 8000, by its version and store
_PAGE = 1000


def tags(trial: Trial) -> dict[str, str]:
    """The record as tags. Not-a-number and infinity become null."""
    text = json.dumps(finite(trial.to_json()), ensure_ascii=False, allow_nan=False)
    return {f"{TAG}.{n}": text[start : start + PIECE] for n, start in enumerate(range(0, len(text), PIECE))}


def record(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """What `tags` wrote; None where there is none, or a piece of it is missing."""
    pieces: list[str] = []
    while (piece := tags.get(f"{TAG}.{len(pieces)}")) is not None:
        pieces.append(piece)
    try:
        found = json.loads("".join(pieces))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def collect(settings: Settings) -> list[dict[str, Any]]:
    """The records of all trials in the tracking store, whichever experiment they are in; a trial may come twice."""
    client = connect(settings.tracking)
    with failures(settings.tracking):
        found = (record(run.data.tags) for run in _runs(client))
        return [one for one in found if one is not None]


def publish(settings: Settings, trials: Iterable[Trial]) -> int:
    """Adds the trials that the tracking store does not hold, or not with their test score, each as a run; returns how
    many.

    They go into the settings' experiment, as parts of a run called "experience".
    """
    from metapeft.tracking.tracker import run

    client = connect(settings.tracking)
    with failures(settings.tracking):
        held = [found for run in _runs(client) if (found := record(run.data.tags)) is not None]
    known, scored = {found.get("id") for found in held}, {found.get("id") for found in held if found.get("score")}
    new = [trial for trial in trials if trial.id not in (known if trial.score is None else scored)]
    if new:
        with run(settings, "experience") as tracker:
            for trial in new:
                tracker.log_trial(trial)
    return len(new)


def _runs(client: MlflowClient) -> Iterator[Run]:
    """All runs of trials."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    token = None
    while experiments:
        page = client.search_runs(experiments, "tags.trial_id != ''", max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
