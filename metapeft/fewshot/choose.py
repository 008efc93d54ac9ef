"""Which strategy suits a few shots: cross-validated on them, and drawn towards what earlier tasks have shown.

Every strategy is trained without some of the shots and answers those, so that each shot is answered once by an adapter
that has not seen it. Strategies are compared shot by shot with the untuned backbone: the mean difference and its
standard error are evidence, weighed against a prior by their variances (a normal mean with a normal prior). With two
shots the prior decides, with two hundred the shots do. What is expected to gain nothing is not chosen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metapeft.data import shots
from metapeft.data.task import Kind, Task
from metapeft.errors import MetapeftError
from metapeft.fewshot import context
from metapeft.fewshot.measure import LOST, Answers, answers
from metapeft.fewshot.train import train
from metapeft.peft import adapters
from metapeft.peft.base import Adapter
from metapeft.peft.saved import Saved
from metapeft.training.session import Session

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

STEPS, AT = 40, (10, 20, 40)  # the schedule, and where it may end
FOLDS = 3
# Variance of one shot's difference that is believed before any is seen, and how many shots that belief is worth.
SPREAD, WORTH = 0.4, 4.0
DOUBT = 1.5  # times its standard error is the evidence unsure: it is of adapters that saw other shots, and fewer


@dataclass(frozen=True)
class Prior:
    """What a strategy gains over the untuned backbone on a new task, in answers, before a shot is looked at."""

    mean: float
    deviation: float


UNKNOWN = Prior(0.0, 0.3)  # of a strategy that was never measured
MEASURED = Path(__file__).parent / "priors.json"  # written by benchmarks/fewshot.py --priors


@cache
def measured(kind: Kind) -> dict[str, Prior]:
    """By strategy, what benchmarks/fewshot.py measured on tasks of this kind (see docs/fewshot.md)."""
    record = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {name: Prior(found["mean"], found["deviation"]) for name, found in record["priors"].get(kind, {}).items()}


Start = Callable[[Session, Sequence[int]], Saved]  # from a session and which of all shots it trains on


@dataclass(frozen=True)
class Strategy:
    """configuration: None where nothing is trained. start: None is the method's own. context: the start is the shots in
    the context.

    rival: the strategy without transfer that a transferred start has to beat. origin, made_of: of the start, for people
    and for programs.
    """

    name: str
    configuration: dict[str, Any] | None = None
    start: Start | None = None
    context: bool = False
    rival: str = ""
    origin: str = ""
    made_of: str = ""


@dataclass(frozen=True)
class Held:
    """Answers to each shot by adapters that have not seen it, by the number of steps; seconds that this took."""

    answers: Mapping[int, Answers]
    seconds: float = 0.0

    def best(self) -> int:
        """After how many steps the answers were best; of equals the fewest."""
        return max(sorted(self.answers), key=lambda step: merit(self.answers[step]).mean())


@dataclass(frozen=True)
class Transfer:
    """A transferred start beside its cold rival, on held-out shots. avoided: it is expected to do harm."""

    rival: str
    difference: float
    standard_error: float
    avoided: bool


@dataclass(frozen=True)
class Judged:
    """A strategy with its best number of steps. difference: from the untuned backbone, measured, with its standard
    error; gain: expected, with its standard deviation; p_better: the chance that it gains. measured: False where it
    answered no held-out shot, so that the prior alone speaks."""

    strategy: str
    steps: int
    difference: float
    standard_error: float
    gain: float
    deviation: float
    p_better: float
    seconds: float
    origin: str = ""
    transfer: Transfer | None = None
    measured: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """`judged`: best first. chosen: None is the untuned backbone. ahead: of `rival`, the next best ("" is the untuned
    backbone), expected, with its standard error."""

    chosen: Judged | None
    judged: tuple[Judged, ...]
    untuned: float
    ahead: float = 0.0
    ahead_error: float = 0.0
    rival: str = ""


def merit(found: Answers) -> np.ndarray:
    """What strategies are compared by, per shot: the mean of the right answer's probability and of its being given."""
    return (found.right + found.hit) / 2


def fold_count(shots: int) -> int:
    return min(shots, FOLDS)


def sessions(
    backbone: Backbone, task: Task, count: int, like: Session | None = None
) -> list[tuple[Session, list[int]]]:
    """Per fold: a session that trains on the other shots and validates on these, and which these are."""
    found = []
    for held in shots.folds(task, count):
        rest = [example for i, example in enumerate(task.train) if i not in set(held)]
        validation = tuple(task.train[i] for i in held)
        part = replace(task, train=tuple(rest), validation=validation, test=shots.spelled(task))
        like = Session(backbone, part, like)
        found.append((like, held))
    return found


def cross_validate(
    strategy: Strategy, folds: Sequence[tuple[Session, list[int]]], at: Sequence[int] = AT, seed: int = 0
) -> Held:
    """Answers of a strategy to every shot. There must be two folds at least."""
    begin = time.perf_counter()
    parts: dict[int, list[tuple[list[int], Answers]]] = {}
    total = sum(len(held) for _, held in folds)
    for session, held in folds:
        rest = [i for i in range(total) if i not in set(held)]
        answered = fitted(strategy, session, rest, at, lambda s, a: answers(s, a, "validation"), seed=seed)
        for step, found in answered.items():
            parts.setdefault(step, []).append((held, found))
    whole = {}
    for step, found_parts in parts.items():
        columns = np.zeros((3, total))
        for held, found in found_parts:
            columns[:, held] = found.hit, found.right, found.loss
        whole[step] = Answers(*columns)
    return Held(whole, time.perf_counter() - begin)


def fitted(
    strategy: Strategy,
    session: Session,
    indices: Sequence[int],
    at: Sequence[int],
    measure: Callable[[Session, Adapter | None], Answers],
    keep: Callable[[int, Adapter], None] | None = None,
    seed: int = 0,
) -> dict[int, Answers]:
    """What `measure` finds of a strategy that learned from the session's training split (shots `indices`), by steps of
    the one schedule (STEPS): after ten of them it is the same training, wherever it ends.

    keep: called with the steps and the attached adapter, after each measurement; then a training that fails raises
    MetapeftError (otherwise its answers count as lost). seed: of the training.
    """
    found: dict[int, Answers] = {}

    def watch(step: int, adapter: Adapter) -> None:
        found[step] = measure(session, adapter)
        if keep is not None:
            keep(step, adapter)

    start = None if strategy.start is None else strategy.start(session, indices)
    owners = None
    if strategy.context and (tokens := context.demonstrations(session)):
        start, owners = adapters.take(context.prefix(session, tokens), {}), context.owners(session)
    if strategy.configuration is None:
        if start is None:
            return {0: measure(session, None)}
        adapter = adapters.build(start, session.model)
        adapter.attach(session.model)
        try:
            watch(0, adapter)
        finally:
            adapter.detach(session.model)
        return found
    where = [*([0] if start is not None and owners is None else []), *at]  # the context itself is a strategy of its own
    trial = train(session, strategy.configuration, watch, steps=STEPS, at=where, start=start, owners=owners, seed=seed)
    if keep is not None and trial.status not in ("ok", "stopped"):
        raise MetapeftError(f"training {strategy.name} on the shots ended as {trial.status} ({trial.error})")
    for step in where:
        if step not in found:  # it diverged before
            count = len(session.encoded["validation"])
            found[step] = Answers(np.zeros(count), np.zeros(count), np.full(count, LOST))
    return found


def belief(differences: np.ndarray, prior: Prior) -> tuple[float, float]:
    """Mean and standard deviation of the mean difference, given what was seen and the prior."""
    n = len(differences)
    if n == 0:
        return prior.mean, prior.deviation
    weight = prior.deviation**2 / (prior.deviation**2 + variance(differences))
    mean = prior.mean + weight * (float(differences.mean()) - prior.mean)
    return mean, prior.deviation * math.sqrt(1 - weight)


def chance(gain: float, deviation: float) -> float:
    """That a gain of this mean and deviation is above zero."""
    return 0.5 * math.erfc(-gain / max(1e-9, deviation) / math.sqrt(2))


def variance(differences: np.ndarray) -> float:
    """Of the mean difference as evidence; there must be one difference at least."""
    n = len(differences)
    scatter = float(((differences - differences.mean()) ** 2).sum())
    return DOUBT**2 * (scatter + WORTH * SPREAD**2) / (n + WORTH) / n


def choose(
    strategies: Sequence[Strategy],
    held: Mapping[str, Held],
    untuned: Answers,
    priors: Mapping[str, Prior],
    too_good: float = 0.0,
) -> Choice:
    """The strategy with the highest expected gain, where it is above zero and the transfer does no harm.

    held: of the strategies that were cross-validated; the others are judged by their priors. untuned: the backbone's
    own answers to the same shots. priors: by strategy; of one that is missing nothing is known. too_good: what choosing
    the best adds to a measured difference (`optimism`): taken off what is believed, not off what is told as measured.
    """
    base = merit(untuned)
    judged = []
    for strategy in strategies:
        prior = priors.get(strategy.name, UNKNOWN)
        mine = held.get(strategy.name)
        step = mine.best() if mine is not None else (max(AT) if strategy.configuration else 0)
        difference = merit(mine.answers[step]) - base if mine is not None else np.zeros(0)
        gain, deviation = belief(difference - too_good, prior)
        judged.append(
            Judged(
                strategy=strategy.name,
                steps=step,
                difference=float(difference.mean()) if len(difference) else 0.0,
                standard_error=standard_error(difference),
                gain=gain,
                deviation=deviation,
                p_better=chance(gain, deviation),
                seconds=mine.seconds if mine is not None else 0.0,
                origin=strategy.origin,
                transfer=_transfer(strategy, held, priors),
                measured=mine is not None,
            )
        )
    judged.sort(key=lambda j: (-j.gain, j.steps, j.strategy))
    usable = [j for j in judged if j.gain > 0 and not (j.transfer and j.transfer.avoided)]
    chosen = usable[0] if usable else None
    choice = Choice(chosen, tuple(judged), float(base.mean()))
    if chosen is None:
        return choice
    others = [j for j in judged if j is not chosen and not (j.transfer and j.transfer.avoided)]
    rival = others[0] if others and others[0].gain > 0 else None
    if rival is None:
        return replace(choice, ahead=chosen.gain, ahead_error=chosen.deviation)
    choice = replace(choice, ahead=chosen.gain - rival.gain, rival=rival.strategy)
    if chosen.strategy not in held or rival.strategy not in held:
        return replace(choice, ahead_error=math.hypot(chosen.deviation, rival.deviation))
    both = merit(held[chosen.strategy].answers[chosen.steps]) - merit(held[rival.strategy].answers[rival.steps])
    before = priors.get(chosen.strategy, UNKNOWN), priors.get(rival.strategy, UNKNOWN)
    return replace(choice, ahead_error=belief(both, _less(*before))[1])


def _transfer(strategy: Strategy, held: Mapping[str, Held], priors: Mapping[str, Prior]) -> Transfer | None:
    if not strategy.rival or strategy.name not in held or strategy.rival not in held:
        return None
    mine, cold = held[strategy.name], held[strategy.rival]
    difference = merit(mine.answers[mine.best()]) - merit(cold.answers[cold.best()])
    expected = _less(priors.get(strategy.name, UNKNOWN), priors.get(strategy.rival, UNKNOWN))
    return Transfer(
        strategy.rival,
        float(difference.mean()),
        standard_error(difference),
        avoided=belief(difference, expected)[0] < 0,
    )


def _less(one: Prior, other: Prior) -> Prior:
    """What is known of the difference between two strategies' gains."""
    return Prior(one.mean - other.mean, math.hypot(one.deviation, other.deviation))


def standard_error(differences: np.ndarray) -> float:
    """Of the mean; the belief about one shot's variance counts as WORTH shots, so that it is never zero."""
    n = len(differences)
    if n == 0:
        return 0.0
    scatter = float(((differences - differences.mean()) ** 2).sum())
    return math.sqrt((scatter + WORTH * SPREAD**2) / (n + WORTH) / n)
