"""Recommendations joined with what then happened.

A trial counts for the last recommendation of its task and backbone that was given before it started and lists its
configuration, so that one trial is never counted twice. Scores are only compared with each other at one training budget
and on one split, the one in which most of the listed configurations were measured; they are compared with predicted
intervals only at the budget that was predicted for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metapeft.meta.evidence import families, key, metric
from metapeft.meta.forecast import CLOSE
from metapeft.training.trial import Score, Trial

BINS = 10  # of chances, as in `metapeft.meta.scores.ece`


@dataclass(frozen=True)
class Kind:
    """How a decision was followed, as far as regret depends on it: the best of many noisy scores is partly luck.

    tried: listed configurations that were measured, the first among them (0: the first was not). near: they are the
    first of the list, not spread over it. examples: of the split that they were measured on.
    """

    tried: int
    near: bool = False
    examples: int = 300


@dataclass(frozen=True)
class Decision:
    """A recommendation with its outcome. None: not known.

    regret: best score among the listed configurations that were measured less the first choice's. outside: share of
    measured scores outside their 90 % intervals. chances: (BINS, 3), per bin of P(within 1 %) the sum of chances, of
    what happened, and how many. disorder: see the function of that name.
    """

    id: str
    at: str  # ISO 8601, UTC
    task: str
    task_version: str
    backbone: str
    family: str
    model: int
    kind: Kind = Kind(0)
    regret: float | None = None
    outside: float | None = None
    disorder: float | None = None
    chances: np.ndarray | None = None
    slowness: float | None = None  # median over its trials: log2 of measured over predicted seconds
    followed: tuple[str, ...] = ()  # ids of trials
    neighbour: str = ""  # nearest known task

    @property
    def like(self) -> str:
        """What kind of task it was, in a person's words."""
        return self.family if self.family != self.task or not self.neighbour else f"{self.task} (like {self.neighbour})"


def joined(entries: Iterable[Mapping[str, Any]], trials: Sequence[Trial]) -> list[Decision]:
    """entries: as `metapeft.meta.decisions.read` gives them. The oldest first."""
    ordered = sorted(entries, key=lambda e: str(e["at"]))
    by_place: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in ordered:
        by_place.setdefault((entry["task_version"], entry["backbone"]), []).append(entry)
    credited: dict[str, list[Trial]] = {}
    listed = {e["id"]: {key(r["configuration"]): r for r in e["recommendations"]} for e in ordered}
    for trial in trials:
        by = metric(trial)
        given = [e for e in by_place.get((trial.task_version, trial.backbone), []) if trial.started >= e["at"][:19]]
        # One that was given before metrics were written down goes with any.
        before = [e for e in given if not by or not e.get("metric") or e["metric"] == by]
        place = key(trial.configuration) if before else ""
        for entry in reversed(before):
            if place in listed[entry["id"]]:
                credited.setdefault(entry["id"], []).append(trial)
                break
    return [_decision(entry, listed[entry["id"]], credited.get(entry["id"], [])) for entry in ordered]


def _decision(entry: Mapping[str, Any], listed: Mapping[str, Mapping[str, Any]], followed: Sequence[Trial]) -> Decision:
    facts: dict[str, Any] = {name: entry[name] for name in ("id", "at", "task", "task_version", "backbone", "model")}
    near = entry.get("neighbours") or []
    facts |= {
        "family": families().get(entry["task"], entry["task"]),
        "neighbour": near[0]["task"] if near else "",
        "followed": tuple(t.id for t in followed),
        "slowness": _slowness(entry, listed, followed),
    }
    measured = _measured(followed, listed)
    first = next((k for k, r in listed.items() if r["rank"] == 1), "")
    outside = _outside(entry, listed, followed)
    if first not in measured or len(measured) < 2:
        return Decision(**facts, kind=Kind(len(measured) if first in measured else 0), outside=outside)
    best = max(score.value for score in measured.values())
    ranks = sorted(listed[place]["rank"] for place in measured)
    pairs = [(listed[place]["p_within_1pct"], float(s.value >= best - CLOSE)) for place, s in measured.items()]
    predicted = np.array([listed[place]["score"]["mean"] for place in measured])
    return Decision(
        **facts,
        kind=Kind(
            tried=len(measured),
            near=ranks[-1] <= len(ranks) + 1 < len(listed),
            examples=min(score.n for score in measured.values()),
        ),
        regret=best - measured[first].value,
        outside=outside,
        disorder=disorder(predicted, np.array([score.value for score in measured.values()])),
        chances=binned(pairs),
    )


def _measured(followed: Sequence[Trial], listed: Mapping[str, Any]) -> dict[str, Score]:
    """Configuration -> mean score over seeds, of the budget and split in which most of them were measured."""
    tables: dict[tuple[int, str], dict[str, list[Score]]] = {}
    for trial in followed:
        for split in ("test", "validation"):
            score = _came_to(trial, split)
            if score is not None and math.isfinite(score.value):
                tables.setdefault((trial.budget, split), {}).setdefault(key(trial.configuration), []).append(score)
    if not tables:
        return {}
    first = next((k for k, r in listed.items() if r["rank"] == 1), "")
    place = max(tables, key=lambda p: (first in tables[p], len(tables[p]), p[1] == "test", p[0]))
    return {
        name: Score(s[0].metric, sum(x.value for x in s) / len(s), s[0].standard_error, s[0].n, s[0].loss)
        for name, s in tables[place].items()
    }


def _came_to(trial: Trial, split: str) -> Score | None:
    """What diverged leaves the backbone as it was, in the experience and in what is promised: so it does here."""
    if trial.status == "diverged":
        return trial.untuned_score  # of the test split; of the other one it is the best guess
    if trial.status != "ok":
        return None
    return trial.score if split == "test" else trial.validation


def _outside(
    entry: Mapping[str, Any], listed: Mapping[str, Mapping[str, Any]], followed: Sequence[Trial]
) -> float | None:
    hits = []
    for trial in followed:
        said = listed[key(trial.configuration)]["score"]
        score = _came_to(trial, "test")
        if score is not None and entry.get("steps", trial.budget) == trial.budget:
            hits.append(not said["low"] <= score.value <= said["high"])
    return sum(hits) / len(hits) if hits else None


def _slowness(
    entry: Mapping[str, Any], listed: Mapping[str, Mapping[str, Any]], followed: Sequence[Trial]
) -> float | None:
    ratios = []
    for trial in followed:
        predicted = listed[key(trial.configuration)].get("seconds")
        if predicted and trial.status == "ok" and trial.seconds > 0 and entry.get("steps") == trial.budget:
            ratios.append(math.log2(trial.seconds / predicted))
    return float(np.median(ratios)) if ratios else None


def disorder(predicted: np.ndarray, measured: np.ndarray) -> float | None:
    """Share of the differences between what was measured, over all pairs, that was predicted the wrong way round: 0 is
    the right order, a half is what guessing gets. Pairs count by their difference: what is nearly equal has no order.
    None for fewer than three, and where all are equal."""
    if len(measured) < 3:
        return None
    a, b = np.triu_indices(len(measured), 1)
    apart, told = measured[a] - measured[b], predicted[a] - predicted[b]
    total = float(np.abs(apart).sum())
    if total <= 1e-12:
        return None
    missed = (1 - np.sign(apart) * np.sign(told)) / 2  # per pair: 0 right, 1 wrong, a half for no order
    return float(np.average(missed, weights=np.abs(apart)))


def binned(pairs: Iterable[tuple[float, float]]) -> np.ndarray:
    """(BINS, 3) of (chance, happened): sums of both, and how many."""
    found = np.zeros((BINS, 3))
    for chance, happened in pairs:
        found[min(int(chance * BINS), BINS - 1)] += (chance, happened, 1.0)
    return found


def ece(bins: np.ndarray) -> np.ndarray:
    """Expected calibration error of (..., BINS, 3) sums of `binned`; nan where there is nothing."""
    total = bins[..., 2].sum(axis=-1)
    away = np.abs(bins[..., 0] - bins[..., 1]).sum(axis=-1)
    found: np.ndarray = np.divide(away, total, out=np.full_like(away, np.nan), where=total > 0)
    return found
