"""A METAPEFT_HOME with a champion that was fitted to synthetic experience, and histories of decisions in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks.histories import Selector, Step, swept
from benchmarks.synthetic import BACKBONE, Nature, World, world
from metapeft.meta import versions
from metapeft.meta.evaluate import judge
from metapeft.meta.experience import Experience
from metapeft.meta.fitting import fit
from metapeft.meta.model import Model
from metapeft.monitoring.promise import Promise, promised
from metapeft.profiling import cache
from metapeft.profiling.profiles import VERSION
from metapeft.settings import home
from tests.meta.made import profile

TASKS = 40


@lru_cache(maxsize=1)
def made() -> tuple[World, Model]:
    """An experience and what fitting makes of it."""
    found = world(TASKS, seed=2, transfer=0.95, filled=0.5)
    return found, fit(found.observations())


@lru_cache(maxsize=1)
def promise() -> Promise:
    found, model = made()
    return Promise(judge(found.observations(), lambda known: model, ()))


def nature() -> Nature:
    """The same laws, on families that nobody knows."""
    random = np.random.default_rng(7)
    own = made()[0].nature
    assert own is not None
    return replace(own, kinds={f"new{i}": random.normal(size=4) for i in range(200)})


def steps(length: int, broken: bool = False, start: int = 0, number: int = 1) -> list[Step]:
    """Decisions that are followed by sweeps. broken: by a model that believes in no difference between methods."""
    found, model = made()
    if broken:
        names = ("method", "configuration", "similar_method", "similar_configuration")
        smaller = {name: 0.02 * model.deviations[name] for name in names}
        model = replace(model, deviations=model.deviations | smaller)
    selector = Selector(model, found.observations(), found, number)
    laws = nature()
    return selector.history(np.random.default_rng([3, start]), laws, length, list(laws.kinds), swept(8), start=start)


def settle(folder: Path | None = None) -> None:
    """Experience, profiles and champion into METAPEFT_HOME, with what is promised of the champion."""
    found, model = made()
    Experience().extend(found.trials)
    for (version, _), features in found.features.items():
        write_profile(version, features)
    observations = found.observations()
    seen = tuple(sorted(o.id for o in observations))
    new = versions._add(versions.Version(0, model, "2029-01-01T00:00:00+00:00", TASKS, len(observations), seen))
    versions.promote(new.number)
    from metapeft.meta.knowledge import knowledge

    known = knowledge(Experience()).observations(model.remaining)
    # Judged by the model as it is: fitting it again for every family takes minutes.
    promised(versions.champion(), known, fitted=lambda rest: model)


def live(history: Sequence[Step]) -> None:
    """Write down decisions and what followed, as metapeft does."""
    with (home() / "decisions.jsonl").open("a", encoding="utf-8") as file:
        for step in history:
            file.write(json.dumps(step.entry) + "\n")
    for step in history:
        write_profile(step.entry["task_version"], step.features)
    Experience().extend([t for step in history for t in step.trials])


def write_profile(version: str, features: dict[str, float]) -> None:
    record = profile(version.rstrip("0")).to_json() | {"features": features, "task_version": version}
    record["backbone"] = BACKBONE
    cache.write(home() / "profiles" / f"{version}-accuracy-cccc-{VERSION}.json", record)
