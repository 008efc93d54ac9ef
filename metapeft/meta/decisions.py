"""What was recommended, and what then happened: METAPEFT_HOME/decisions.jsonl, one line per recommendation given.

The identity of a recommendation is its content: given again, it counts once, from the first time. Outcomes are not
stored: they are the trials of the same task and backbone that started later, joined whenever they are asked for.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.errors import UserError
from metapeft.files import add_line
from metapeft.meta.evidence import key
from metapeft.settings import home
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from metapeft.meta.recommendation import Recommendation

NEEDED = {"id", "at", "task", "task_version", "backbone", "model", "recommendations"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """`followed`: the trials of recommended configurations. `regret`: the best later score less that of the first
    choice, None until it was tried. `inside`: the shares of followed scores that lie in their 80 and 90 %
    intervals."""

    recommendation: str
    task: str
    task_version: str
    backbone: str
    at: str
    model: int
    followed: dict[str, int]  # trial id -> rank
    best: float | None
    regret: float | None
    inside_80: float | None
    inside_90: float | None


def record(found: Recommendation, steps: int | None = None) -> str:
    """Write a recommendation down; returns its id. steps: the training budget that its scores are predicted for.

    Raises UserError when METAPEFT_HOME cannot be written.
    """
    path = _file()
    line = {"id": found.id, "at": datetime.now(UTC).isoformat(timespec="microseconds"), **found.to_json()}
    if steps is not None:
        line["steps"] = steps
    data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode()
    try:
        add_line(path, data)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); set METAPEFT_HOME to a folder you may write in"
        ) from error
    return found.id


def read() -> list[dict[str, Any]]:
    """All recommendations given, the oldest first, each as JSON with `id` and `at`."""
    try:
        lines = _file().read_bytes().split(b"\n")
    except OSError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.strip():
            try:
                entry = json.loads(line)
                if not entry.keys() >= NEEDED:
                    raise ValueError("it lacks a part")
                found.setdefault(entry["id"], entry)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                _log.warning("%s holds a line that is no recommendation; skipped", _file())
    return list(found.values())


def outcomes(trials: Sequence[Trial], entries: Sequence[dict[str, Any]] | None = None) -> list[Outcome]:
    """Every recommendation (None: as `read` gives them now) with the scored trials that came after it."""
    by_task: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        if trial.score is not None and math.isfinite(trial.score.value):
            by_task.setdefault((trial.task_version, trial.backbone), []).append(trial)
    found = read() if entries is None else entries
    return [_joined(entry, by_task.get((entry["task_version"], entry["backbone"]), [])) for entry in found]


def _joined(entry: dict[str, Any], trials: Sequence[Trial]) -> Outcome:
    by = entry.get("metric")  # what was recommended before it was written down goes with any
    trials = [t for t in trials if t.score is not None and by in (None, "", t.score.metric)]
    budget = entry.get("steps")  # what was predicted; a trial of fewer or more steps says nothing about it
    later = [t for t in trials if t.started >= entry["at"][:19] and budget in (None, t.budget)]
    ranks = {key(e["configuration"]): e for e in entry["recommendations"]}
    followed = [(t, ranks[key(t.configuration)]) for t in later if key(t.configuration) in ranks]
    scores = {t.id: t.score.value for t in later if t.score is not None}
    first = [scores[t.id] for t, e in followed if e["rank"] == 1]
    best = max(scores.values(), default=None)

    def inside(name: str) -> float | None:
        hits = [e[name]["low"] <= scores[t.id] <= e[name]["high"] for t, e in followed]
        return sum(hits) / len(hits) if hits else None

    return Outcome(
        recommendation=entry["id"],
        task=entry["task"],
        task_version=entry["task_version"],
        backbone=entry["backbone"],
        at=entry["at"],
        model=entry["model"],
        followed={t.id: e["rank"] for t, e in followed},
        best=best,
        regret=best - sum(first) / len(first) if first and best is not None else None,
        inside_80=inside("likely"),
        inside_90=inside("score"),
    )


def _file() -> Path:
    return home() / "decisions.jsonl"
