"""Adapting to a task from a few shots: tries what is open here on them, chooses, and leaves an ordinary adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.errors import Unfit
from metapeft.fewshot import context, reptile, tried, worth
from metapeft.fewshot.choose import (
    Choice,
    Held,
    Judged,
    Prior,
    Strategy,
    choose,
    cross_validate,
    fitted,
    fold_count,
    measured,
    sessions,
)
from metapeft.fewshot.measure import Answers, answers
from metapeft.fewshot.optimism import Optimism, optimism
from metapeft.fewshot.strategies import METHODS, strategies
from metapeft.fewshot.train import digest
from metapeft.peft import adapters, checkpoints
from metapeft.peft.base import Adapter
from metapeft.peft.saved import Saved
from metapeft.runtime import MB, mx
from metapeft.settings import home
from metapeft.training.configuration import full
from metapeft.training.evaluation import evaluate, proportion_error, untuned
from metapeft.training.session import Session
from metapeft.training.trial import Score, Trial, trial_id

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

NEIGHBOURS = 4  # tasks whose adapters are looked at

Report = Callable[[str, int, int], None]  # what is being tried, how many were, of how many


@dataclass(frozen=True)
class Adapted:
    """What came of the shots. chosen: None where the untuned backbone is best; then there is no adapter.

    held_out_untuned: the untuned backbone's answers to the shots, between 0 and 1. score, untuned_score: on the task's
    test split, where it has one. prompt: where the shots in the context are best, what to put before every question.
    skipped: strategies that were not tried: there was no time (`late`), or one shot only, which cannot be held out, or
    what was tried let nothing better be expected of them. registered: the adapter in the registry, and the MLflow run
    ({} where it is in none). optimism: how much too good the held-out answers looked because the choice was made by
    them; the trial's validation score is without it.
    """

    task: str
    shots: int
    chosen: Judged | None
    why: str
    judged: tuple[Judged, ...]
    held_out_untuned: float
    adapter: str
    trial: Trial | None
    score: Score | None
    untuned_score: Score | None
    seconds: float
    skipped: tuple[str, ...] = ()
    late: bool = False
    prompt: str = ""
    registered: dict[str, Any] = field(default_factory=dict)
    optimism: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def adapt(
    task: Task,
    backbone: Backbone,
    *,
    seed: int = 0,
    max_seconds: float | None = None,
    without: Collection[str] = (),
    only: Collection[str] = (),
    priors: Mapping[str, Prior] | None = None,
    report: Report | None = None,
) -> Adapted:
    """Learns the task from its training split, all of which are shots; the test split only measures what came of it.

    max_seconds: for trying; the strategy that is being tried is finished, a transferred start that would be chosen is
    compared with cold training, and the chosen one is trained after it. What is tried, and in what order:
    `metapeft.fewshot.worth`. After a kill, what was tried is not tried again
    (until `tried.clear`).
    without: names and families of tasks that nothing is taken over from, beside tasks of its own name. only: those to
    try (default: all). priors: None is what was measured on other tasks of its kind. The adapter goes to
    METAPEFT_HOME/adapters/TRIAL_ID. Raises UserError for shots that the backbone cannot read.
    """
    from metapeft.meta import library
    from metapeft.profiling import profile

    begin = time.monotonic()
    session = Session(backbone, replace(task, validation=task.train, test=task.test or task.train[:1]))
    near = library.find(profile(task, backbone), NEIGHBOURS, without=without, named=task.name)
    found = strategies(session, near, starts_of(backbone, {task.family, *without} - {""}, task.name))
    found = [s for s in found if not only or s.name in only]
    folds = sessions(backbone, task, fold_count(len(task.train)), session) if len(task.train) > 1 else []
    base, beliefs = answers(session, None, "train"), measured(task.kind) if priors is None else priors
    held: dict[str, Held] = {}
    late = False
    while folds:
        least = 0.0 if only else worth.LEAST  # what was asked for is tried
        each = worth.following(found, held, base, beliefs, worth.measured(), least)
        if each is not None and max_seconds is not None and time.monotonic() - begin > max_seconds:
            late = True
            each = worth.uncompared(found, held, base, beliefs)
        if each is None:
            break
        if report is not None:
            report(each.name, len(held), len(found))
        place = tried.place(task, backbone.identity, each, seed)
        answered = tried.read(place)
        if answered is None:
            try:
                answered = cross_validate(each, folds, seed=seed)
            except Unfit:  # more virtual tokens than positions, for example
                found.remove(each)
                continue
            tried.write(place, answered)
        held[each.name] = answered
    weighed = [s for s in found if s.name in held] or found[:1]
    too_good = optimism(weighed, held, base, beliefs) if held else Optimism(0.0, 0.0)
    choice = choose(weighed, held, base, beliefs, too_good.gain)
    before = untuned(session, "test") if task.test else None
    if report is not None:
        report(f"training: {choice.chosen.strategy}" if choice.chosen else "measuring", len(held), len(found))
    strategy = next((s for s in found if choice.chosen and s.name == choice.chosen.strategy), None)
    trial, folder = None, ""
    if strategy is not None:
        trial, folder = _leave(session, task, strategy, choice, seed, before, held.get(strategy.name), too_good.score)
    return Adapted(
        task=task.name,
        shots=len(task.train),
        chosen=choice.chosen,
        why=explained(choice),
        judged=choice.judged,
        held_out_untuned=choice.untuned,
        adapter=folder,
        trial=trial,
        score=before if trial is None else trial.score,
        untuned_score=before,
        seconds=time.monotonic() - begin,
        skipped=tuple(s.name for s in found if s not in weighed),
        late=late,
        prompt=_prompt(session) if strategy is not None and strategy.name == "context" else "",
        optimism=too_good.score if trial is not None else 0.0,
    )


def starts_of(backbone: Backbone, without: Collection[str] = (), named: str = "") -> dict[str, Saved]:
    """The meta-learned starts that are here, by method; one that was learned on any of these tasks or families, or on a
    task of this name, does not count."""
    found = {}
    for method in METHODS:
        learned = reptile.read(reptile.place(backbone, method))
        known = set() if learned is None else {*learned.tasks, *learned.families}
        if learned is not None and named not in learned.tasks and not known & set(without):
            found[method] = learned.saved
    return found


def explained(choice: Choice) -> str:
    """The choice in a sentence or two."""
    said = []
    chosen = choice.chosen
    measured = any(judged.measured for judged in choice.judged)
    if not choice.judged:
        said.append("Leave the backbone untuned: none of the strategies asked for is open on these shots.")
    elif chosen is None:
        why = "nothing that was tried is expected to gain anything"
        if not measured:
            why = "nothing was measured on held-out shots, and what earlier tasks have shown lets no gain be expected"
        said.append(f"Leave the backbone untuned: {why}.")
    else:
        named = f"{chosen.strategy} ({f'{chosen.steps} steps' if chosen.steps else 'without training'})"
        over = f"over the untuned backbone's {choice.untuned:.3f}"
        how_sure = "over 99.9%" if chosen.p_better >= 0.9995 else f"{chosen.p_better:.1%}"
        sure = f"{how_sure} sure that it gains"
        ahead = f"; {choice.ahead:.3f} ± {choice.ahead_error:.3f} ahead of {choice.rival}" if choice.rival else ""
        if chosen.measured:
            found = f"measured {chosen.difference:+.3f} ± {chosen.standard_error:.3f} on held-out shots"
            said.append(f"{named} is expected to gain {chosen.gain:.3f} {over} ({found}), {sure}{ahead}.")
        else:
            what = "It was not" if measured else "Nothing was"
            said.append(
                f"{what} measured on held-out shots; what earlier tasks have shown says that {named} gains"
                f" {chosen.gain:.3f} ± {chosen.deviation:.3f} {over}, {sure}{ahead}."
            )
    for judged in choice.judged:
        if judged.transfer is not None and judged.transfer.avoided:
            beside = f"{judged.transfer.difference:+.3f} ± {judged.transfer.standard_error:.3f}"
            said.append(f"Negative transfer avoided: {judged.strategy} beside {judged.transfer.rival}: {beside}.")
    return " ".join(said)


def _leave(
    session: Session,
    task: Task,
    strategy: Strategy,
    choice: Choice,
    seed: int,
    before: Score | None,
    held: Held | None,
    too_good: float,
) -> tuple[Trial, str]:
    """Learns from all shots, scores and saves; the trial's record and its adapter's folder. What the trial calls its
    validation are the answers to shots that were held out, less what they are too good."""
    assert choice.chosen is not None
    steps = choice.chosen.steps
    kept: dict[int, Saved] = {}
    begin = time.perf_counter()

    def keep(step: int, adapter: Adapter) -> None:
        kept[step] = adapters.take(adapter, {})

    everything = range(len(task.train))
    at = [steps] if steps else []
    if strategy.configuration is not None and not steps:  # a start that no step made better
        strategy = replace(strategy, configuration=None)
    mx.reset_peak_memory()
    fitted(strategy, session, everything, at, lambda s, a: answers(s, a, "train", [0]), keep, seed)
    train_seconds = time.perf_counter() - begin
    saved = kept[steps]
    configuration = full((strategy.configuration or {}) | saved.config.to_json())
    backbone = session.backbone
    identity = trial_id(
        *(task.name, task.version, backbone.identity, configuration, seed, steps, len(task.train)),
        f"few shots, {strategy.name}, {digest(saved)}",  # the library, and so a start, may be another the next time
        task.metric,
    )
    adapter = adapters.build(saved, session.model)
    adapter.attach(session.model)
    try:
        score = evaluate(session, adapter, "test") if task.test else None
    finally:
        adapter.detach(session.model)
    trial = Trial(
        id=identity,
        task=task.name,
        task_version=task.version,
        backbone=backbone.id,
        method=saved.config.method,
        configuration=configuration,
        seed=seed,
        budget=steps,
        status="ok",
        score=score,
        validation=None if held is None else _held_out(task, held.answers[steps], too_good),
        untuned_score=before,
        seconds=train_seconds,
        train_seconds=train_seconds,
        peak_memory_mb=mx.get_peak_memory() / MB,
        trained_parameters=sum(int(value.size) for value in saved.tensors.values()),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        train_examples=len(task.train),
    )
    folder = home() / "adapters" / identity
    trial.adapter = str(folder)
    template = task.template if isinstance(task.train[0].prompt, str) else ""
    form = {"name": task.name, "kind": task.kind, "labels": list(task.labels), "template": template}
    few = {"strategy": strategy.name, "why": explained(choice), "origin": strategy.origin, "shots": len(task.train)}
    if strategy.name == "context":
        few["prompt"] = _prompt(session)
    metadata = {"trial": trial.to_json(), "backbone": backbone.id, "steps": steps, "task": form, "few_shots": few}
    checkpoints.write(folder, replace(saved, metadata=saved.metadata | metadata))
    trial.adapter_bytes = (folder / "adapter_model.safetensors").stat().st_size
    return trial, str(folder)


def _held_out(task: Task, found: Answers, too_good: float) -> Score:
    """Answers to held-out shots as a score; of macro F1 only the accuracy is known. The loss is per example."""
    metric = "accuracy" if task.kind == "classification" else task.metric
    right, n = max(0.0, float(found.hit.mean()) - too_good), len(found.hit)
    return Score(metric, right, proportion_error(right, n), n, float(found.loss.mean()))


def _prompt(session: Session) -> str:
    return str(session.backbone.tokenizer.decode(context.demonstrations(session)))
