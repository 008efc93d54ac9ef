"""The ways to learn from a few shots that are open here: what the library and the meta-learned starts allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metapeft.backbones.forward import keys_values
from metapeft.errors import UserError
from metapeft.fewshot import context, starts
from metapeft.fewshot.choose import Start, Strategy
from metapeft.fewshot.measure import answers
from metapeft.fewshot.mix import mix
from metapeft.fewshot.train import digest
from metapeft.meta.library import Found
from metapeft.peft import adapters
from metapeft.peft.prefix import one_shape
from metapeft.peft.saved import Saved
from metapeft.runtime import mx
from metapeft.training.session import Session

METHODS = ("lora", "prefix")  # what is trained from a cold start, and what starts are learned for
WARM = 0.5  # a start that knows something is trained at this part of the cold rate
MIXED = 4  # adapters in a mixture at most
LEAST_SHOWN = 3  # shots in the context that is trained further: one is learned from, in a fold one more is held out
NEAR = 0.5  # nats of loss that the likeness of a task, from 0 to 1, counts as when the nearest adapter is chosen


def cold(depth: int) -> dict[str, dict[str, Any]]:
    """Few-shot-safe settings by method, for a backbone of so many layers: rates that get there in 40 steps, and few
    enough weights for four examples."""
    top_third = max(1, round(depth / 3))
    return {
        "lora": {"method": "lora", "learning_rate": 2e-3, "rank": 8, "alpha": 16.0, "layers": top_third},
        "prefix": {"method": "prefix", "learning_rate": 1e-2, "tokens": 16},
    }


def tuned_context(shots: int) -> dict[str, Any]:
    """Small steps: the context is good already. Of few shots one at a time is learned from, so that the others stay."""
    return {"method": "prefix", "learning_rate": 3e-3, "batch_size": max(1, min(8, shots // 4))}


def strategies(session: Session, near: Sequence[Found], learned: Mapping[str, Saved]) -> list[Strategy]:
    """All of them. session: trains on all shots. near: adapters of the nearest tasks. learned:
    meta-learned starts by method."""
    fresh = cold(session.depth)
    if not _prefixed(session):
        del fresh["prefix"]
    goes_on = {method: c | {"learning_rate": c["learning_rate"] * WARM} for method, c in fresh.items()}
    shown = len(context.shown(session)) if "prefix" in fresh else 0
    found = [Strategy("context", context=True)] if shown else []
    if shown >= LEAST_SHOWN:
        found.append(Strategy("tuned context", tuned_context(len(session.encoded["train"])), context=True))
    found += [Strategy(f"cold {method}", configuration) for method, configuration in fresh.items()]
    for method, saved in learned.items():
        if method not in fresh:
            continue
        name = f"reptile {method}"
        start, made_of = always(saved), _known(saved)
        rival, origin = f"cold {method}", "many other tasks"
        found.append(Strategy(name, goes_on[method], start, rival=rival, origin=origin, made_of=made_of))
    for method in fresh:
        alike = usable(session, [f for f in near if starts.start_method(f.entry.trial.method) == method])
        if not alike:
            continue
        names = list(dict.fromkeys(f.entry.trial.task for f, _ in alike))
        name, rival, pick = f"nearest {method}", f"cold {method}", Nearest(session, alike)
        origin = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
        made_of = " ".join(f"{_known(saved)}:{f.similarity!r}" for f, saved in alike)
        found.append(Strategy(name, goes_on[method], pick, rival=rival, origin=origin, made_of=made_of))
        if method == "lora" and len(alike) > 1:
            few = [saved for _, saved in alike[:MIXED]]
            origin = " + ".join(f.entry.trial.task for f, _ in alike[:MIXED])
            made_of = " ".join(_known(saved) for saved in few)
            mixed = Strategy("mix lora", goes_on["lora"], mixture(few), rival=rival, origin=origin, made_of=made_of)
            found.append(mixed)
    return found


def _known(saved: Saved) -> str:
    """What a start is, for programs."""
    return f"{digest(saved)} {saved.config.to_json()}"


def _prefixed(session: Session) -> bool:
    """Whether keys and values may be put before a prompt on this backbone."""
    try:
        one_shape(keys_values(session.model, mx.array([[0]])))
    except UserError:
        return False
    return True


def always(saved: Saved) -> Start:
    """The same start whatever the shots are."""
    return lambda session, indices: saved


def mixture(saved: Sequence[Saved]) -> Start:
    """The mixture that suits the shots best."""
    return lambda session, indices: mix(session, saved)[0]


def usable(session: Session, near: Sequence[Found]) -> list[tuple[Found, Saved]]:
    """With their adapters; damaged ones, and those that do not fit the backbone, are left out."""
    found = []
    for each in near:
        try:
            saved = starts.start(each.entry.read())
            adapters.build(saved, session.model)
        except UserError:
            continue
        found.append((each, saved))
    return found


class Nearest:
    """Of several adapters the one that answers the shots best, likeness of its task counted: a start."""

    def __init__(self, session: Session, near: Sequence[tuple[Found, Saved]]):
        self.near = list(near)
        self.session = session
        self._losses: np.ndarray | None = None  # (adapters, shots), nats

    def losses(self) -> np.ndarray:
        if self._losses is None:
            rows = []
            for _, saved in self.near:
                adapter = adapters.build(saved, self.session.model)
                adapter.attach(self.session.model)
                try:
                    rows.append(answers(self.session, adapter, "train").loss)
                finally:
                    adapter.detach(self.session.model)
            self._losses = np.array(rows)
        return self._losses

    def __call__(self, session: Session, indices: Sequence[int]) -> Saved:
        likeness = np.array([f.similarity for f, _ in self.near])
        cost = self.losses()[:, list(indices)].mean(axis=1) - NEAR * likeness
        return self.near[int(np.argmin(cost))][1]

    def chosen(self) -> Found:
        """With all shots."""
        saved = self(self.session, range(self.losses().shape[1]))
        return next(f for f, s in self.near if s is saved)
