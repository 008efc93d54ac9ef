"""What callers say of served answers: METAPEFT_HOME/serving/feedback.jsonl, one line each, on disk when it is accepted.

No text of a user is kept, only which adapter version answered and whether it was right; METAPEFT_FEEDBACK_TEXT=1 keeps
the answer and what would have been right too.

An adapter version is watched against its own test score. The test is an e-detector (Shin, Ramdas and Rinaldo 2023): a
Shiryaev-Roberts sum of bets that answers are wrong more often than promised. It may be looked at after every answer,
without correction, and while the promise holds gives a false alarm once in LENGTH answers or more rarely.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from metapeft.errors import UserError
from metapeft.files import add_line
from metapeft.settings import home

Verdict = Literal["right", "wrong"]
LENGTH = 10_000  # answers between false alarms, at least, per version
SLACK = 0.02  # by which an adapter may do worse than its test score
ERRORS = 2.0  # standard errors of that score that it is trusted to
BETS = np.array([0.2, 0.5, 0.8])  # shares of what may be bet; mixed
RECENT = 100
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feedback:
    """model: NAME@VERSION in the registry, or the backbone's name. id: of the answer."""

    at: str  # ISO 8601, UTC
    model: str
    verdict: Verdict
    id: str = ""
    answer: str | None = None
    correct: str | None = None


def record(
    model: str, verdict: Verdict, id: str = "", answer: str | None = None, correct: str | None = None
) -> Feedback:
    """Write one down. Raises UserError when METAPEFT_HOME cannot be written."""
    keep = os.environ.get("METAPEFT_FEEDBACK_TEXT") == "1"
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    said = Feedback(at, model, verdict, id, answer if keep else None, correct if keep else None)
    data = json.dumps({k: v for k, v in asdict(said).items() if v is not None}, ensure_ascii=False).encode()
    try:
        add_line(path(), data, 0o600)
    except OSError as error:
        raise UserError(
            f"cannot write {path()} ({error.strerror}); set METAPEFT_HOME to a folder you may write in"
        ) from error
    return said


def read() -> list[Feedback]:
    """All of it, the oldest first; an answer that was judged twice counts as it was judged last."""
    try:
        lines = path().read_bytes().split(b"\n")
    except OSError:
        return []
    found: dict[str, Feedback] = {}
    for number, line in enumerate(lines):
        if line.strip():
            try:
                said = Feedback(**json.loads(line))
            except (ValueError, TypeError):
                _log.warning("%s holds a line that is no feedback; skipped", path())
                continue
            place = f"{said.model} {said.id}" if said.id else f"line {number}"
            found.pop(place, None)
            found[place] = said
    return list(found.values())


@dataclass(frozen=True)
class Served:
    """How a version did on feedback. evidence: 1 and more is an alarm. since: index of the first answer of the worse
    stretch."""

    model: str
    answers: int
    accuracy: float  # of the last RECENT
    promised: float
    evidence: float
    fired: int | None
    since: int | None


def watch(model: str, right: Sequence[bool], promised: float, error: float) -> Served:
    """promised: the registered test score (accuracy or exact match) and its standard error. right: the oldest first.

    Of a score so low that it promises nothing, no answers are too bad: it never fires.
    """
    least = min(max(promised - ERRORS * error - SLACK, 0.0), 0.999)
    accuracy = float(np.mean(right[-RECENT:])) if len(right) else float("nan")
    if least == 0:
        return Served(model, len(right), accuracy, promised, 0.0, None, None)
    wrong = 1.0 - np.asarray(right, dtype=float)
    # A bet pays 1 + b (wrong - (1 - least)), whose expectation is at most 1 while answers are right as promised.
    most = 1 / (1 - least) if least < 1 else 1.0
    totals, sums = np.zeros(len(BETS)), 0.0
    fired = None
    highest = 0.0
    for place, x in enumerate(wrong):
        totals = (totals + 1) * (1 + BETS * min(most, 5.0) * (x - (1 - least)))
        sums = float(totals.mean())
        if sums >= LENGTH and fired is None:
            fired = place
        recent = wrong[max(0, place - RECENT + 1) : place + 1]
        if fired is not None and place - fired >= RECENT and recent.mean() <= 1 - least:  # as promised again
            fired, totals = None, np.zeros(len(BETS))
        highest = float(np.log1p(sums) / np.log1p(LENGTH))
    since = None
    if fired is not None:
        rises = np.concatenate([[0.0], np.cumsum(wrong[: fired + 1] - (1 - least))])
        since = int(min(np.flatnonzero(rises == rises.min())[-1], fired))
    evidence = max(highest, 1.0) if fired is not None else highest
    return Served(model, len(wrong), accuracy, promised, evidence, fired, since)


def path() -> Path:
    return home() / "serving" / "feedback.jsonl"
