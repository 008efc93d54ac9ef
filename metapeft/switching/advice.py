"""Everything a decision rests on, gathered once before a training: alternatives, their prices, and a forecaster."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metapeft.data.task import Task
from metapeft.meta import evidence, versions
from metapeft.meta.evidence import Known, families, key
from metapeft.meta.experience import Experience
from metapeft.meta.knowledge import Knowledge, knowledge
from metapeft.meta.model import Model
from metapeft.meta.portfolio import portfolio
from metapeft.meta.recommendation import counting, nominal_speed, short
from metapeft.peft import METHODS
from metapeft.profiling import Profile
from metapeft.profiling import speed as speeds
from metapeft.profiling.shapes import Shapes
from metapeft.profiling.speed import Speed
from metapeft.switching.forecast import Calibration, Forecaster, calibrated, left_out
from metapeft.switching.prices import Price, prices
from metapeft.training.trial import Trial

PER_METHOD = 2  # alternatives of each method: those that the meta-model expects most of

_kept: dict[object, Calibration] = {}


@dataclass(frozen=True)
class Alternative:
    """A configuration (without its number of evaluations) and what it costs."""

    configuration: dict[str, Any]
    price: Price


@dataclass(frozen=True)
class Basis:
    """What advice was made of: a version of the meta-model, and trials by their ids."""

    version: int = 0
    trials: tuple[str, ...] = ()


@dataclass(frozen=True)
class Advice:
    """start: the configuration that training begins with; others: what it may be exchanged for."""

    start: Alternative
    others: tuple[Alternative, ...]
    forecaster: Forecaster
    basis: Basis = Basis()


def advice(
    task: Task,
    profile: Profile,
    start: dict[str, Any],
    steps: int,
    untuned: float,
    experience: Experience | None = None,
    speed: Speed | None = None,
    basis: Basis | None = None,
    without: Collection[str] = (),
    model: Model | None = None,
) -> Advice:
    """For a training of `start` that would take `steps`. untuned: the backbone's validation score. The same experience
    gives the same advice; so does a later one, told the basis of before. Of the task's own trials the validation score
    alone counts: decisions must not know test answers. without: families of tasks whose trials do not count; model:
    None is the champion's. Both are for judging."""
    known = knowledge(experience)
    speed = speed or speeds.read(profile.backbone_content) or nominal_speed(profile)
    champion = versions.champion() if basis is None else versions.numbered(basis.version)
    model = model or champion.model
    kinds = families()
    then = None if basis is None else set(basis.trials)
    counted = [t for t in known.trials if kinds.get(t.task, t.task) not in without and (then is None or t.id in then)]
    own = [(t.task_version, t.backbone) == (task.version, profile.backbone) for t in counted]
    if len(counted) < len(known.trials) or any(own):
        seen = (validated(t, untuned) if mine else t for t, mine in zip(counted, own, strict=True))
        known = Knowledge(tuple(seen), known.profiles)
    here = Known(
        task.version,
        profile.backbone,
        task.name,
        kinds.get(task.name, task.name),
        len(task.train),
        profile.features,
        task.metric,
    )
    counts = counting(known, model, here, own=True)
    trials = [t for t in known.trials if t.method in METHODS]
    same = [t for t in trials if t.backbone == profile.backbone]
    state = (tuple((t.id, t.score is None) for t in same), json.dumps(model.to_json()))
    if state not in _kept:
        _kept.clear()
        _kept[state] = calibrated(left_out(same, known.observations(model.remaining), model))
    device = speed.measured.get("device", "")
    forecaster = Forecaster(here, counts, same, model, untuned, len(task.test), _kept[state], device)
    first = plain(start)
    chosen = [first, *_best(forecaster, profile.shapes, first, trials, task.version, steps)]
    costs = prices(chosen, profile, speed, trials, known.profiles)
    return Advice(
        Alternative(chosen[0], costs[0]),
        tuple(Alternative(c, p) for c, p in zip(chosen[1:], costs[1:], strict=True)),
        forecaster,
        Basis(champion.number, tuple(t.id for t in known.trials)),
    )


def _best(
    forecaster: Forecaster, shapes: Shapes, start: dict[str, Any], trials: Sequence[Trial], version: str, steps: int
) -> list[dict[str, Any]]:
    """Of each method the configurations that are expected to gain most, of the portfolio and what was tried here."""
    tried = [plain(t.configuration) for t in trials if t.task_version == version and t.status == "ok"]
    found: dict[str, dict[str, Any]] = {}
    for configuration in (*map(plain, portfolio(shapes.depth)), *tried):
        if shapes.takes(configuration["method"]):
            found.setdefault(key(configuration), configuration)
    found.pop(key(start), None)
    candidates = list(found.values())
    means = forecaster.before([(c, steps) for c in candidates]).mean
    best: list[dict[str, Any]] = []
    for method in METHODS:
        ranked = sorted((i for i, c in enumerate(candidates) if c["method"] == method), key=lambda i: (-means[i], i))
        best += [short(candidates[i]) for i in ranked[:PER_METHOD]]
    return best


def validated(trial: Trial, untuned: float) -> Trial:
    """The trial without what it knows of the test split. untuned: the backbone's validation score."""
    start = trial.validation or trial.untuned_score
    return replace(trial, score=None, untuned_score=replace(start, value=untuned) if start else None)


def plain(configuration: dict[str, Any]) -> dict[str, Any]:
    """With the usual number of evaluations, which says nothing about quality: configurations that differ in it alone
    are one."""
    return short(evidence.plain(configuration))
