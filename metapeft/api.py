"""What the command line does, for Python: `metapeft.load`, `recommend`, `train`, `sweep`, `adapt`.

Each runs the pipeline's stages up to its own in a work folder (by default one per task, backbone and data settings, in
METAPEFT_HOME/work); stages whose inputs have not changed are not run again. All raise UserError on wrong input.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft import stages
from metapeft.errors import UserError
from metapeft.settings import DEFAULT_BACKBONE, Settings, brief, home, load_settings, user_path
from metapeft.stages.files import folders_of, read_task, read_trials
from metapeft.stages.stage import alone, read_json
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from metapeft.data.task import Task
    from metapeft.fewshot.adapt import Adapted
    from metapeft.meta import Recommendation
    from metapeft.monitoring.monitor import Report
    from metapeft.monitoring.remeasure import Remeasured
    from metapeft.profiling import Profile
    from metapeft.search import Sweep
    from metapeft.search.grow import Grown
    from metapeft.switching.sequence import Kind, Learned

PROFILED = ("version", "validate", "profile")
BEFORE_SWEEP = (*PROFILED, "recommend")


def load(backbone: str, adapter: str | Path | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer, as `mlx_lm.load` gives them.

    adapter: a folder in metapeft's, Hugging Face PEFT's or mlx-lm's format. `model(ids)` returns logits for the real
    tokens, (batch, tokens, vocabulary), whatever virtual tokens the adapter adds; `mlx_lm.generate` works with it.
    """
    from metapeft import backbones
    from metapeft.peft import adapters

    base = backbones.load(backbone)
    if adapter is None:
        return base.model, base.tokenizer
    return adapters.with_adapter(base.model, adapters.load(Path(adapter), base.model)), base.tokenizer


def profile(task: str | Path, *, work: Path | None = None, **options: Any) -> Profile:
    """The task's measured characteristics. options: backbone, seed, params (a settings file)."""
    from metapeft.profiling import Profile

    settings = settings_for(task, **options)
    work = work or work_folder(settings)
    with alone(work):
        stages.run(PROFILED, settings, work)
        return Profile.from_json(read_json(work / "profile" / "profile.json"))


def recommend(
    task: str | Path,
    *,
    prefer: str | None = None,
    max_seconds: float | None = None,
    max_memory_mb: float | None = None,
    work: Path | None = None,
    **options: Any,
) -> Recommendation:
    """Ranked configurations for a task, from all that is known now, trials of this very task included.

    (The pipeline's own recommendation, made before its sweep, does not change because of the sweep's trials.) options:
    backbone, seed, params.
    """
    from metapeft.stages.recommend import ranked

    wanted = {"prefer": prefer, "max_seconds": max_seconds, "max_memory_mb": max_memory_mb}
    settings = settings_for(task, recommend=wanted, **options)
    work = work or work_folder(settings)
    with alone(work):
        stages.run(PROFILED, settings, work)
        return ranked(settings, work)


def sweep(
    task: str | Path,
    *,
    trials: int | None = None,
    steps: int | None = None,
    max_seconds: float | None = None,
    max_trial_seconds: float | None = None,
    max_memory_mb: float | None = None,
    workers: int | None = None,
    methods: list[str] | None = None,
    space: dict[str, Any] | None = None,
    warm: bool | None = None,
    stop: bool | None = None,
    repeats: int | None = None,
    sampler: str | None = None,
    adapters: bool | None = None,
    work: Path | None = None,
    **options: Any,
) -> Sweep:
    """Trials on a task and their Pareto front; `report` is a page about them. options: backbone, seed, params.

    max_seconds: for all trials together; max_trial_seconds, max_memory_mb: constraints on every trial, and on what it
    starts with. warm: False starts without what other tasks have taught. stop: False gives every trial the whole
    budget. repeats: of the trials, how many repeat the best with other seeds. adapters: their size is an objective too.
    """
    from metapeft.report import Content, write_report
    from metapeft.stages.sweep import check

    wanted: dict[str, Any] = {
        "trials": trials,
        "steps": steps,
        "max_seconds": max_seconds,
        "max_trial_seconds": max_trial_seconds,
        "max_memory_mb": max_memory_mb,
        "workers": workers,
        "methods": methods,
    }
    wanted |= {"space": space, "warm": warm, "stop": stop, "repeats": repeats, "sampler": sampler, "adapters": adapters}
    settings = settings_for(task, sweep=wanted, **options)
    check(settings)
    work = work or work_folder(settings)
    with alone(work):
        result = stages.run((*BEFORE_SWEEP, "sweep"), settings, work)["sweep"]
        found = read_sweep(work)
        found.reused = len(found.trials) if result.cached else result.summary["reused"]
        content = Content(
            task=read_task(work / "version"),
            trials=found.trials,
            infeasible=found.infeasible,
            adapters=found.adapters,
            recommendation=read_json(work / "recommend" / "recommendation.json"),
            called=settings.task,
        )
        found.report = write_report(work / "sweep-report", content).html
        return found


def train(
    task: str | Path,
    *,
    method: str | None = None,
    configuration: dict[str, Any] | None = None,
    steps: int | None = None,
    switch: bool | None = None,
    work: Path | None = None,
    **options: Any,
) -> Trial:
    """Train one configuration with the full budget, score it, register it and write a page about it (its place:
    `metapeft.api.report_of`).

    Without a method: the best of the task's sweep where there was one, else the first recommended. switch: the method
    may be exchanged on the way, within the same seconds (docs/switching.md). options: backbone, seed, params.
    """
    wanted = {"method": method, "configuration": configuration, "steps": steps, "switch": switch}
    settings = settings_for(task, train=wanted, **options)
    one_method(settings.train.method, settings.train.configuration)
    work = work or work_folder(settings)
    with alone(work):
        stages.run((*BEFORE_SWEEP, "train", "evaluate", "register", "report"), settings, work)
        return read_trial(work)


def report_of(task: str | Path, *, work: Path | None = None, **options: Any) -> Path:
    """Where `train` leaves its page about a task. options: those that `train` was given."""
    return (work or work_folder(settings_for(task, **options))) / "report" / "report.html"


def adapt(
    task: str | Path,
    *,
    shots: int | None = None,
    max_seconds: float | None = None,
    strategies: Sequence[str] = (),
    **options: Any,
) -> Adapted:
    """Learn a task from a few examples, in the way that suits them best; leaves an adapter in METAPEFT_HOME/adapters
    and registers it.

    shots: how many training examples, drawn evenly from all labels; None (or as many as there are): every row of a
    file, none held out for a test. max_seconds: for trying. strategies: to try only these. options: backbone, seed,
    params.
    """
    from metapeft import backbones, tracking
    from metapeft.data.shots import load_shots
    from metapeft.fewshot import STRATEGIES, tried
    from metapeft.fewshot.adapt import adapt as adapted
    from metapeft.fewshot.register import register
    from metapeft.progress import progress, say

    some_time(max_seconds)
    for name in strategies:
        if name not in STRATEGIES:
            raise UserError(f"unknown strategy {brief(repr(name), 60)}; choose from {', '.join(STRATEGIES)}")
    settings = settings_for(task, **options)
    chosen, left_out = load_shots(settings.task, shots, settings.data, settings.seed)
    base = backbones.load(settings.backbone)
    for note in left_out:
        say(f"adapt: {note}")
    with tracking.run(settings, f"adapt {chosen.name}") as tracker, progress("adapt", 1.0) as advance:

        def report(what: str, done: int, total: int) -> None:
            advance(done / max(1, total), f"{done} of {total} tried; {what}", line=True)

        limits: dict[str, Any] = {"max_seconds": max_seconds, "only": strategies}
        found = register(tracker, chosen, adapted(chosen, base, seed=settings.seed, **limits, report=report))
    tried.clear(chosen, base.identity, settings.seed)
    return found


def learn_starts(
    tasks: Sequence[str] | None = None,
    *,
    methods: Sequence[str] = (),
    rounds: int = 200,
    max_seconds: float | None = None,
    **options: Any,
) -> dict[str, int]:
    """Meta-learn the starts that `adapt` may begin from, on these tasks (default: those of the catalog in the library);
    goes on where it was. Returns the rounds done, by method. options: backbone, seed, params."""
    import time

    from metapeft import backbones
    from metapeft.backbones.forward import anatomy
    from metapeft.data import catalog, load_task
    from metapeft.fewshot import reptile
    from metapeft.fewshot.strategies import METHODS, cold
    from metapeft.meta import library
    from metapeft.progress import progress

    some_time(max_seconds)
    settings = settings_for("meta", **options)
    known = sorted({entry.trial.task for entry in library.entries() if catalog.find(entry.trial.task)})
    names = list(tasks or known)
    wanted = list(dict.fromkeys(methods or METHODS))
    if unknown := [method for method in wanted if method not in METHODS]:
        raise UserError(f"no start can be learned for {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    if not names:
        raise UserError("the library has no adapter of a catalog task to learn from: name tasks, or train on some")
    loaded = [load_task(name, settings.data) for name in names]
    base = backbones.load(settings.backbone)
    fresh = cold(anatomy(base.model).depth)
    until = time.monotonic() + (float("inf") if max_seconds is None else max_seconds)
    done = {}
    for method in wanted:
        with progress(f"start for {method}", rounds) as advance:

            def report(number: int, loss: float, advance: Any = advance) -> bool:
                advance(number, f"round {number} of {rounds}: loss {loss:.3f}")
                return time.monotonic() > until

            folder = reptile.place(base, method)
            learned = reptile.reptile(base, loaded, fresh[method], rounds=rounds, folder=folder, report=report)
            done[method] = learned.rounds
    return done


def train_sequence(
    tasks: Sequence[str | Path],
    *,
    keep: Kind = "adapters",
    buffer: int = 32,
    strength: float | None = None,
    method: str | None = None,
    configuration: dict[str, Any] | None = None,
    steps: int | None = None,
    **options: Any,
) -> Learned:
    """Train tasks one after another, and measure what is left of the earlier ones (docs/switching.md). Where each has
    an adapter of its own, these are registered.

    keep: how earlier tasks are kept; buffer: examples of each that "replay" mixes in; strength: of the penalty of "ewc"
    and "l2". method: of all tasks (default: lora). options: backbone, seed, params. The same call again continues, or
    reads what is there.
    """
    from metapeft import backbones, tracking
    from metapeft.data import load_task
    from metapeft.progress import progress
    from metapeft.switching import sequence
    from metapeft.switching.register import register
    from metapeft.training.configuration import full

    if not tasks:
        raise UserError("a sequence needs at least one task")
    places = [os.path.realpath(user_path(task)) for task in tasks]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"the sequence names {brief(tasks[number], 60)} twice; name each of its tasks once")
    one_method(method, configuration or {})
    kept = sequence.Keep(keep, buffer, strength)
    wanted = full({"method": method or "lora"} | (configuration or {}))
    settings = settings_for(tasks[0], train={"steps": steps}, **options)
    alone = {"method": wanted["method"], "configuration": wanted, "switch": False}  # what made each, and nothing else
    train = settings.train.model_copy(update=alone)
    every = [settings.model_copy(update={"task": str(task), "train": train}) for task in tasks]
    loaded = [load_task(str(task), settings.data) for task in tasks]
    if keep == "adapters":
        one_name([task.name for task in loaded])
    base, budget = backbones.load(settings.backbone), settings.train.steps
    name = f"sequence of {len(loaded)} tasks"
    with tracking.run(settings, name) as tracker, progress("train-sequence", len(loaded) * budget) as advance:

        def on_event(number: int, event: dict[str, Any]) -> None:
            score = event.get("validation_score")
            note = f"{loaded[number].name}: loss {event['train_loss']:.3f}"
            note += f", validation {score:.3f}" if score is not None else ""
            advance(number * budget + event["step"], note, line=score is not None)

        found = sequence.train_sequence(base, loaded, wanted, kept, steps=budget, seed=settings.seed, progress=on_event)
        register(tracker, loaded, every, found)
        return found


def grow(
    tasks: Sequence[str] | None = None,
    *,
    backbone: str | None = None,
    max_seconds: float | None = None,
    max_trials: int | None = None,
) -> Grown:
    """Grow the experience on these tasks (default: the catalog); on stderr: what is expected and what was done."""
    from metapeft import backbones
    from metapeft.data import catalog
    from metapeft.progress import progress, say
    from metapeft.search import grow as growth

    some_time(max_seconds)
    names = list(tasks or (entry.name for entry in catalog.entries()))
    base = backbones.load(backbone or DEFAULT_BACKBONE)

    def planned(grown: growth.Grown) -> None:
        for name, reason in grown.skipped.items():
            say(f"grow: {name} left out: {reason}")
        left = grown.cells - grown.known
        hours = grown.predicted_seconds / 3600
        say(f"grow: {left} of {grown.cells} trials are not known yet, about {hours:.1f} hours of work here")

    with progress("grow", max_seconds or 1.0) as advance:

        def ended(grown: growth.Grown, trial: Trial) -> None:
            untuned, score = trial.untuned_score, trial.score
            result = f"{untuned.value:.3f} -> {score.value:.3f}" if untuned and score else trial.status
            left = max_seconds - grown.seconds if max_seconds else grown.predicted_seconds
            note = f"trial {grown.trials}: {trial.task} {trial.train_examples} {trial.method} {result}"
            done = grown.seconds / max_seconds if max_seconds else grown.seconds / (grown.seconds + left)
            note += f" in {trial.seconds:.1f} s; about {max(0.0, left) / 60:.0f} minutes left"
            advance(min(1.0, done) * (max_seconds or 1.0), note, line=True)

        return growth.grow(names, base, max_seconds=max_seconds, max_trials=max_trials, on_plan=planned, on_trial=ended)


def monitor(
    *,
    shadow: int | None = None,
    remeasure: int | None = None,
    tell: bool = True,
    estimate: bool = True,
    retrains: str = "",
    params: Path | None = None,
) -> Report:
    """Is the advice still as good as promised, and what is served with it? Says what is new by the configured channels.

    shadow: trials of the runner-up that are run first (None: as the settings say). remeasure: profiles that are
    measured again (the same; all whose rows are here where one differs, and those are replaced). tell: False says and
    remembers nothing, and runs no trial. estimate: whether a new alert comes with the benefit of retraining (minutes).
    retrains: the name of whoever retrains for what the report calls due; to others it is not due any more.
    """
    from metapeft.monitoring import monitor as monitoring

    if shadow and not tell:
        raise UserError("a shadow trial is remembered, so a dry run has none: leave out --shadow or --dry-run")
    settings = settings_for("monitor", params=params, monitor={"shadow": shadow, "remeasure": remeasure})
    if settings.monitor.shadow and tell:
        from metapeft import backbones
        from metapeft.monitoring import shadow as trials

        trials.run(settings.monitor.shadow, decided, backbones.load)
    again: list[Remeasured] = []
    if settings.monitor.remeasure:
        from metapeft import backbones
        from metapeft.monitoring import remeasure as profiles

        again = profiles.run(settings.monitor.remeasure, decided, backbones.load, profiled)
    return monitoring.monitor(settings, tell=tell, estimate=estimate, again=again, retrains=retrains)


def decided(entry: dict[str, Any]) -> Task | None:
    """The task of a recommendation that was given here, None where its rows are gone or have changed."""
    for folder in folders_of(entry["task_version"]):
        with suppress(UserError):
            return read_task(folder / "version")
    return None


def profiled(task_version: str) -> list[Path]:
    """What the stage `profile` left of a task, wherever it ran here."""
    return [folder / "profile" / "profile.json" for folder in folders_of(task_version)]


def some_time(max_seconds: float | None) -> None:
    """Raises UserError for a limit that leaves no time at all."""
    if max_seconds is not None and not max_seconds > 0:
        raise UserError(f"max_seconds={max_seconds:g} leaves no time; give --max-seconds above 0, or leave it out")


def one_method(method: str | None, configuration: dict[str, Any]) -> None:
    """Raises UserError where the configuration names another method."""
    other = configuration.get("method", method)
    if method is not None and other != method:
        raise UserError(
            f"two methods are named, {brief(method, 60)} (--method, or train.method) and {brief(other, 60)} (--set"
            " method=…, or train.configuration); keep one"
        )


def one_name(names: Sequence[str]) -> None:
    """Raises UserError where two tasks have one name: their adapters would be versions of one model."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two tasks of the sequence are called {brief(name, 60)}, and their adapters would be versions of one"
                " model; rename one of the files"
            )


def settings_for(task: str | Path, *, params: Path | None = None, **given: Any) -> Settings:
    """Settings from a file (default: params.yaml where there is one) and what was given on top; None: not given.

    Raises UserError for wrong settings and for an id that cannot be a backbone.
    """
    from metapeft import backbones

    default = Path("params.yaml")
    settings = load_settings(params or (default if default.exists() else None), task=str(task), **given)
    backbones.check(settings.backbone)  # before the data is read and checked, which takes seconds
    return settings


def work_folder(settings: Settings) -> Path:
    """The default place of a task's stage outputs: one per task, backbone and data settings."""
    where = user_path(settings.task)
    task, backbone = (  # what a relative path names depends on where one is; Path.exists raises where it may not look
        str(path.absolute()) if os.path.exists(path) else name
        for path, name in ((where, settings.task), (user_path(settings.backbone), settings.backbone))
    )
    identity = [task, backbone, settings.data.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return home() / "work" / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', where.stem).strip('-') or 'task'}-{digest}"


def read_trial(work: Path) -> Trial:
    """The final training's record; `adapter` is the folder where it stays."""
    trial = Trial.from_json(read_json(work / "evaluate" / "trial.json"))
    kept = home() / "adapters" / trial.id
    trial.adapter = str(kept if kept.is_dir() else (work / "train" / "adapter").absolute())
    return trial


def read_sweep(work: Path) -> Sweep:
    """The sweep as the stage left it."""
    from metapeft.search import Sweep, pareto

    record = read_json(work / "sweep" / "sweep.json")
    trials = {trial.id: trial for trial in read_trials(work / "sweep" / "trials.jsonl")}
    for trial in trials.values():
        folder = home() / "adapters" / trial.id
        trial.adapter = str(folder) if folder.is_dir() else ""
    merged = {t.id: t for t in pareto.averaged(t for t in trials.values() if t.id not in record["infeasible"])}
    return Sweep(
        study=record["study"],
        storage="",
        task=record["task"],
        task_version=record["task_version"],
        trials=list(trials.values()),
        front=[merged[id] for id in record["front"]],
        points={name: merged[id] for name, id in record["points"].items()},
        infeasible=record["infeasible"],
        adapters=record["adapters"],
        complete=record["complete"],
    )
