"""sweep: tries configurations on the task, the recommended ones first, and keeps the Pareto front.

Trials are chosen by validation alone; at the end the points with a name are scored on the test split too. Writes
trials.jsonl, sweep.json (front, named points, why others are not on it, how trials are stopped), and for plots
front.csv and curves.csv.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.progress import progress
from metapeft.settings import Settings
from metapeft.stages.budget import Budget
from metapeft.stages.files import CURVE, read_task, write_csv, write_trials
from metapeft.stages.stage import Stage, backbone_identity, read_json, write_json
from metapeft.stages.trainer import Trainer
from metapeft.training.engine import SOURCES, engine
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from metapeft.profiling import Profile
    from metapeft.profiling.shapes import Shapes
    from metapeft.profiling.speed import Speed
    from metapeft.search import Limits, Sweep
    from metapeft.search.spaces import Space
    from metapeft.search.stopping import StopRule
    from metapeft.search.sweep import Run
    from metapeft.settings import SweepSettings

OVER = ".stages/sweep-over.json"  # from a worker whose time was over to the stage that gathers
NEAR = 1.5  # learning rates that differ by less train about alike
POINT = ["trial", "method", "score", "standard_error", "seconds", "peak_memory_mb", "front", "status"]


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Run or continue the task's study until it has its trials."""
    from metapeft.search.pareto import PREFERRED, judged
    from metapeft.stages.tracked import pipeline_run

    prepared = prepare(settings, work)
    task = prepared.task
    with pipeline_run(settings, work, task) as tracker:
        tracker.set_tags({"strategy": strategy(settings), "sweep": prepared.study})
        time_is_over = prepared.over(work)
        result = prepared.gather() if time_is_over else prepared.run(lambda trial: tracker.log_trial(trial, task))
        if result.reused:
            tracker.log_missing(result.trials, task)  # a kill came between their end and their record there
        chosen = {trial.id for trial in result.points.values()}
        for trial in result.trials:
            if trial.id in chosen:
                prepared.train.tested(trial)
                tracker.log_trial(trial, task)  # now with its score
        spent = sum(trial.seconds for trial in result.trials)
        tracker.log_metrics({"sweep.trials": len(result.trials), "sweep.seconds": spent})
    for trial in result.trials:  # in DVC's cache a path of this machine would be a lie
        trial.adapter = ""
    record = result.to_json() | {"task": task.name, "backbone": backbone_identity(settings), "engine": engine()}
    if prepared.rule is not None:
        record["stopping"] = {"alpha": prepared.rule.alpha, **asdict(prepared.rule.replayed)}
    for volatile in ("trials", "storage", "reused"):  # the same trials must make the same files
        del record[volatile]
    write_trials(result.trials, out / "trials.jsonl")
    write_json(out / "sweep.json", record)
    front = {trial.id for trial in result.front}
    write_csv(out / "front.csv", [_point(trial, trial.id in front) for trial in result.trials if judged(trial)], POINT)
    rows = [{"trial": trial.id, "method": trial.method} | row for trial in result.trials for row in trial.curve]
    write_csv(out / "curves.csv", rows, CURVE)
    (work / OVER).unlink(missing_ok=True)
    best = result.points.get(PREFERRED[settings.recommend.prefer])
    return {
        "trials": len(result.trials),
        "ok": sum(trial.status == "ok" for trial in result.trials),
        "stopped": sum(trial.status == "stopped" for trial in result.trials),
        "reused": result.reused,
        "complete": result.complete,
        "best": best.method if best else None,
        "front": len(front),
        "warnings": [_ended(result, settings.sweep)] if result.late else [],
    }


@dataclass
class Prepared:
    """The task's study, ready to be worked on: by the stage, or by one of several workers."""

    settings: Settings
    task: Task
    train: Trainer
    space: Space
    limits: Limits
    start: list[dict[str, Any]]
    expected: Expected
    rule: StopRule | None

    @property
    def study(self) -> str:
        from metapeft.search.sweep import study_name

        return f"{study_name(self.task, self.settings, self.space, self.limits)}-{engine()}"

    def run(self, ended: Callable[[Trial], object], label: str = "sweep", train: Run | None = None) -> Sweep:
        """Claims and trains trials until the study has enough, whoever else works on it; `ended` gets every new one."""
        from metapeft.search.pareto import judged
        from metapeft.search.sweep import sweep as search

        total, done = self.settings.sweep.trials, 0
        with progress(label, total) as advance:

            def on_event(event: dict[str, Any]) -> None:
                advance(min(done + event["step"] / event["steps"], total), f"trial {done + 1} of {total}")

            def on_trial(trial: Trial, now: int, will: int) -> None:
                nonlocal done
                done = now
                found = judged(trial)
                result = f"{found.metric} {found.value:.3f}" if found else trial.status
                advance(done, f"trial {done} of {will}: {trial.method} {result}, {trial.seconds:.0f} s", line=True)
                ended(trial)

            self.train.on_event = on_event
            return search(
                train or self.train,
                self.task,
                self.settings,
                warm_start=self.start,
                space=self.space,
                limits=self.limits,
                study=self.study,
                on_trial=on_trial,
                rule=self.rule,
                memory=self.expected.memory,
            )

    def over(self, work: Path) -> bool:
        """Whether the time of this very sweep was over for one of several workers: nobody then begins a new one."""
        with suppress(UserError):
            return bool(read_json(work / OVER) == self.limit)
        return False

    @property
    def limit(self) -> list[Any]:
        return [self.study, self.settings.sweep.max_seconds]

    def gather(self) -> Sweep:
        """What the study holds, nothing trained."""
        from metapeft.search.sweep import load

        found = load(self.study, self.task, self.settings)
        found.late = not found.complete
        return found


@dataclass(frozen=True)
class Expected:
    """What is known of a configuration before it is trained. (May be sent to other processes.)"""

    profile: Profile
    speed: Speed
    recommendations: list[dict[str, Any]]
    steps: int

    def memory(self, configuration: dict[str, Any], steps: int) -> float:
        """Predicted peak in MiB."""
        from metapeft.meta.costs import cost

        return cost(configuration, self.profile, self.speed, steps).peak_memory_mb

    def point(self, configuration: dict[str, Any]) -> tuple[float, float, float] | None:
        """Score, seconds and MiB; the score is that of the recommended configuration of the method with the nearest
        learning rate. None where that is a factor of NEAR away."""
        from metapeft.meta.costs import cost
        from metapeft.training.configuration import full

        rate = math.log(full(configuration)["learning_rate"])
        same = [e for e in self.recommendations if e["method"] == configuration["method"]]
        entry = min(same, key=lambda e: abs(math.log(e["configuration"]["learning_rate"]) - rate), default=None)
        if entry is None or abs(math.log(entry["configuration"]["learning_rate"]) - rate) > math.log(NEAR):
            return None
        needs = cost(full(configuration), self.profile, self.speed, self.steps)
        return entry["score"]["mean"], needs.seconds, needs.peak_memory_mb


def check(settings: Settings) -> None:
    """Raises UserError for a sweep that makes no sense, which is cheaper to find before anything is read."""
    from metapeft.search import spaces

    wanted = settings.sweep
    if wanted.repeats is not None and wanted.repeats >= wanted.trials:
        raise UserError(
            f"repeats={wanted.repeats} leaves none of the {wanted.trials} trials for a first time; give fewer --repeats"
            " or more --trials"
        )
    spaces.space(wanted.methods, wanted.space)


def prepare(settings: Settings, work: Path) -> Prepared:
    """From what the earlier stages left in `work`. Raises UserError for a search space that makes no sense, and for
    limits that nothing recommended keeps."""
    from metapeft.meta.recommendation import nominal_speed
    from metapeft.peft.matrices import linear_layers
    from metapeft.profiling import Profile
    from metapeft.profiling import speed as speeds
    from metapeft.search import Limits
    from metapeft.search.warm import warm_start

    check(settings)
    task = read_task(work / "version")
    profile = Profile.from_json(read_json(work / "profile" / "profile.json"))
    recommended = read_json(work / "recommend" / "configurations.json")
    nearest = read_json(work / "recommend" / "nearest.json")
    speed = speeds.read(profile.backbone_content) or nominal_speed(profile)
    found = read_json(work / "recommend" / "recommendation.json")
    expected = Expected(profile, speed, found["recommendations"], settings.sweep.steps)
    first = [recommended[rank - 1] for rank in found["together"]]
    if settings.sweep.max_trial_seconds or settings.sweep.max_memory_mb:
        budget = Budget(settings, _space(settings, profile.shapes), expected, found["steps"])
        budget.check(recommended)  # before the model is loaded
        first, recommended, nearest = (budget.allowed(each) for each in (first, recommended, nearest))
    start = warm_start(first, recommended, nearest, settings.sweep.trials, expected.point)
    train = Trainer(settings.backbone, task, profile.version, test=False)
    session = train.session()
    modules = {path.rsplit(".", 1)[-1] for path in linear_layers(session.model)}
    return Prepared(
        settings,
        task,
        train,
        _space(settings, profile.shapes, modules),
        Limits(
            settings.sweep.max_trial_seconds or settings.recommend.max_seconds,
            settings.sweep.max_memory_mb or settings.recommend.max_memory_mb,
        ),
        start if settings.sweep.warm else [],
        expected,
        _rule(settings, task) if settings.sweep.stop else None,
    )


def strategy(settings: Settings) -> str:
    """How the sweep searches, as `metapeft compare` calls it: "warm tpe", "cold random", …"""
    return f"{'warm' if settings.sweep.warm else 'cold'} {settings.sweep.sampler}"


def _rule(settings: Settings, task: Task) -> StopRule:
    """When to stop, as far as recorded curves of other tasks teach it."""
    from metapeft.meta.experience import Experience
    from metapeft.search.stopping import calibrated

    known = Experience().trials()
    return calibrated(t for t in known if t.backbone == settings.backbone and t.task_version != task.version)


def _space(settings: Settings, shapes: Shapes, modules: Collection[str] | None = None) -> Space:
    """The search space, fitted to a backbone of these shapes with linear layers of these names (None: any). Raises
    UserError where the backbone takes none of the methods."""
    from metapeft.peft import METHODS
    from metapeft.search import spaces
    from metapeft.training.configuration import looks

    narrow = {"evaluations": looks(settings.sweep.steps)} | settings.sweep.space
    wanted = settings.sweep.methods or METHODS
    methods = [method for method in wanted if shapes.takes(method)]
    if not methods:
        raise UserError(f"this backbone cannot be tuned by {', '.join(wanted)}; search other methods (--method)")
    return spaces.space(methods, narrow, depth=shapes.depth, modules=modules)


def _ended(result: Sweep, wanted: SweepSettings) -> str:
    return (
        f"ended at its time limit of {wanted.max_seconds:g} s with {len(result.trials)} of {wanted.trials} trials;"
        " a higher sweep.max_seconds (--max-seconds) goes on"
    )


def _point(trial: Any, on_front: bool) -> dict[str, Any]:
    from metapeft.search.pareto import judged

    found = judged(trial)
    assert found is not None
    values = {"trial": trial.id, "method": trial.method, "score": found.value, "standard_error": found.standard_error}
    measured = {"seconds": trial.train_seconds or trial.seconds, "peak_memory_mb": trial.peak_memory_mb}
    return values | measured | {"front": int(on_front), "status": trial.status}


STAGE = Stage(
    "sweep",
    body,
    settings=("backbone", "seed", "sweep", "recommend"),
    needs=("version", "profile", "recommend"),
    code=(
        "metapeft/meta",
        "metapeft/profiling",
        "metapeft/search",
        *SOURCES,
        "metapeft/stages/budget.py",
        "metapeft/stages/files.py",
        "metapeft/stages/sweep.py",
        "metapeft/stages/trainer.py",
    ),
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
