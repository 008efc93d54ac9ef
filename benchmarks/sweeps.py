"""Do sweeps that start warm find better trade-offs, sooner? Seven strategies on tasks left out of the experience.

    python benchmarks/sweeps.py [--quick] [--json FILE] [--live] [--experience FOLDER_OR_FILE] [--workers N]

Replay. For every task that the experience has tried densely, a surrogate of that task answers what a configuration
scores, takes and needs: the recorded test score, seconds and memory of the nearest recorded configurations of its
method (a Gaussian kernel over log learning rate, sizes and choices). What a sweep observes has honest noise on it: the
deviation between seeds, and the sampling error of the recorded validation split. Each task is swept without anything
the experience knows of its family: the model is fitted, the nearest tasks' fronts and the stop rule are made from the
others. Strategies:

    warm          metapeft as it is, but without repeats: starts from recommendation and similar tasks, TPE, stopping
    repeats       the same, with a quarter of the trials repeating the best
    cold          metapeft without a start (`--cold`)
    tpe           Optuna's multi-objective TPE as it comes; no stopping
    nsga2         Optuna's NSGA-II
    random        random search
    recommended   the first recommended configuration, nothing else

Every strategy has as many trials; `warm` goes on to twice as many, to compare at equal wall time too: stopped trials
are cheap. Wall time is that of the trials one after another. Hypervolume (score, seconds,
memory; one reference per task) and best score are the surrogate's truth about what was tried, not the noisy numbers
that the sweep saw; `chosen` is the truth about what the sweep would report as most accurate.

Live (--live): two tasks swept for real, warm, and cold without stopping, by validation scores, in new METAPEFT_HOMEs
that share only the downloads; of the experience that ships, the task's family is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

LEAST_CONFIGURATIONS = 10  # measured on a task, of at least three methods, for a surrogate
LEAST_TASKS = 8  # of the protocol
TRIALS, FIRST = 30, 3
STRATEGIES = ("warm", "repeats", "cold", "tpe", "nsga2", "random", "recommended")
OCTAVE = math.log(2.0)  # learning rates a factor of 2 apart
OWN_SAMPLING = 0.7  # share of a validation split's error that is not common to all configurations
SEED_DEVIATION = 0.02  # where nothing was repeated
LIVE_TASKS = ("country_demonym", "irregular_plural")
DEPTH = 30  # layers of the default backbone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three tasks, one seed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--live", action="store_true", help="also sweep two tasks for real")
    parser.add_argument("--live-trials", type=int, default=10)
    parser.add_argument("--live-steps", type=int, default=40)
    parser.add_argument("--live-tasks", default=",".join(LIVE_TASKS))
    parser.add_argument("--experience", type=Path, help="default: the one in METAPEFT_HOME, and what is shipped")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="tasks replayed at the same time")
    options = parser.parse_args()

    from metapeft.runtime import describe

    trials = experience(options.experience)
    places = dense(trials)
    seeds = (0,) if options.quick else (0, 1, 2)
    chosen = places[:3] if options.quick else places
    say(f"{len(trials)} trials; {len(places)} tasks tried with {LEAST_CONFIGURATIONS} configurations or more")
    rows: list[dict[str, Any]] = []
    if len(places) >= 2:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of each worker
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            for found in pool.map(replayed, repeat(trials), chosen, repeat(seeds), repeat(options.trials)):
                rows += found
    enough = len(places) >= LEAST_TASKS
    targets = judged(rows, options.trials)
    live: list[dict[str, Any]] = []
    if options.live:
        for task in options.live_tasks.split(","):
            live += swept(task, options.live_trials, options.live_steps)
    print(table(rows, options.trials))
    for task, early, final, errors in behind(rows):
        print(
            f"{task}: best score {early:.3f} after {FIRST} trials, {final:.3f} at the end: {errors:.1f} standard errors"
        )
    for row in live:
        best, volume, seconds = (row[name][-1] for name in ("best", "hypervolume", "seconds"))
        print(f"live {row['task']} {row['strategy']}: best {best:.3f}, hypervolume {volume:.3f} after {seconds:.0f} s")
    for target in targets:
        value = "not known" if target["value"] is None else f"{target['value']:.3f}"
        print(f"{'met' if target['met'] else 'NOT MET'}: {target['name']}: {value} (target {target['target']})")
    if not enough:
        say(
            f"too little experience: the protocol wants {LEAST_TASKS} densely tried tasks, there are {len(places)};"
            " `metapeft experience grow` makes more"
        )
    if options.json:
        command = " ".join(["python", "benchmarks/sweeps.py", *sys.argv[1:]])
        record = {
            "machine": describe(),
            "command": command,
            "tasks": [{"task": p[0].task, "examples": p[0].train_examples, "trials": len(p)} for p in places],
            "enough": enough,
            "rows": rows,
            "live": live,
            "targets": targets,
            "behind": behind(rows),
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if enough and all(t["met"] for t in targets) else 1


def experience(path: Path | None) -> list[Any]:
    """All trials of the default backbone at the budget that most of them have."""
    from metapeft.meta.experience import Experience
    from metapeft.settings import DEFAULT_BACKBONE

    with tempfile.TemporaryDirectory() as folder:
        store = Experience() if path is None else Experience(Path(folder), shipped=None)
        if path is not None:
            store.merge(path)
        trials = [t for t in store.trials() if t.backbone == DEFAULT_BACKBONE]
        store.close()
    budgets = Counter(t.budget for t in trials)
    usual = budgets.most_common(1)[0][0] if budgets else 0
    return [t for t in trials if t.budget == usual]


def dense(trials: Sequence[Any]) -> list[list[Any]]:
    """The trials of each task that can become a surrogate, its largest size only; most configurations first."""
    by_task: dict[str, dict[str, list[Any]]] = {}
    for trial in trials:
        by_task.setdefault(trial.task, {}).setdefault(trial.task_version, []).append(trial)
    found = []
    for versions in by_task.values():
        place = max(versions.values(), key=lambda p: (p[0].train_examples, p[0].task_version))
        usable = [t for t in place if known(t) or t.status == "diverged"]
        different = {json.dumps(t.configuration, sort_keys=True) for t in usable if known(t)}
        if len(different) >= LEAST_CONFIGURATIONS and len({t.method for t in usable if known(t)}) >= 3:
            found.append(usable)
    return sorted(found, key=lambda p: (-len(p), p[0].task))


def known(trial: Any) -> bool:
    return trial.status == "ok" and trial.score is not None and math.isfinite(trial.score.value)


@dataclass
class World:
    """What a configuration scores, takes and needs on one task, from its recorded trials.

    Called as a sweep's `run`: trains nothing, and answers at once. `truth` is without noise.
    """

    place: list[Any]
    deviation: float
    noise_seed: int = 0
    cache: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scores = [t.score.value for t in self.place if known(t)]
        base = [t.untuned_score.value for t in self.place if t.untuned_score]
        self.untuned = base[0] if base else min(scores)
        sizes = [t.validation.n for t in self.place if t.validation]
        self.examples = round(statistics.median(sizes)) if sizes else 64

    def truth(self, configuration: dict[str, Any]) -> dict[str, Any]:
        """{"status", "score", "seconds", "memory", "near"}: of the nearest recorded configurations of the method."""
        key = json.dumps(configuration, sort_keys=True)
        if key not in self.cache:
            self.cache[key] = self._truth(configuration)
        return dict(self.cache[key])

    def _truth(self, configuration: dict[str, Any]) -> dict[str, Any]:
        same = [t for t in self.place if t.method == configuration["method"]]
        if not same:  # never tried here: as good as nothing, for the price of the others
            return {"status": "diverged", "score": self.untuned, "seconds": usual(self.place, "seconds"),
                    "memory": usual(self.place, "peak_memory_mb"), "near": None}  # fmt: skip
        far = np.array([distance(configuration, t.configuration) for t in same])
        weights = np.exp(-(far - far.min()))
        weights /= weights.sum()
        diverged = np.array([t.status == "diverged" for t in same])
        good = ~diverged
        batch = configuration.get("batch_size", 8) / 8
        near = same[int(far.argmin())]
        cost = [float(np.exp(weights @ np.log([max(getattr(t, n), 1e-3) for t in same])))
                for n in ("train_seconds", "peak_memory_mb")]  # fmt: skip
        seconds = cost[0] * (0.3 + 0.7 * batch)  # evaluation and what is the same for any batch
        if weights[diverged].sum() > 0.5 or not good.any():
            return {"status": "diverged", "score": self.untuned, "seconds": seconds, "memory": cost[1], "near": near}
        share = weights[good] / weights[good].sum()
        score = float(share @ [t.score.value for t in np.array(same, dtype=object)[good]])
        return {"status": "ok", "score": score, "seconds": seconds, "memory": cost[1], "near": near}

    def __call__(self, configuration: dict[str, Any], seed: int, steps: int, trial_id: str, watch: Any = None) -> Any:
        from metapeft.training.trial import Score

        true = self.truth(configuration)
        near = true.pop("near")
        template = near or self.place[0]
        digest = hashlib.sha256(f"{trial_id}/{seed}/{self.noise_seed}".encode()).digest()
        noise = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal()
        trial = replace(
            template, id=trial_id, configuration=configuration, method=configuration["method"], seed=seed, budget=steps,
            status=true["status"], score=None, validation=None, seconds=true["seconds"], train_seconds=true["seconds"],
            peak_memory_mb=true["memory"], curve=[], error="", adapter="",
        )  # fmt: skip
        if true["status"] != "ok":
            return trial
        sampling = math.sqrt(true["score"] * (1 - true["score"]) / self.examples)
        seen = true["score"] + noise * math.hypot(self.deviation, OWN_SAMPLING * sampling)
        seen = min(1.0, max(0.0, seen))
        trial.validation = Score(self.place[0].score.metric if self.place[0].score else "accuracy", seen,
                                 sampling, self.examples, 1 - seen)  # fmt: skip
        shift = seen - (near.validation.value if near and near.validation else seen)
        scale = true["seconds"] / max(near.train_seconds, 1e-3) if near else 1.0
        for row in near.curve if near and near.status == "ok" else ():
            score = row.get("validation_score")
            part = row["step"] / near.budget
            moved = None if score is None else min(1.0, max(0.0, score + shift * part))
            step = round(part * steps)
            trial.curve.append(row | {"step": step, "seconds": row["seconds"] * scale, "validation_score": moved})
            measured_ = {"steps": steps, "curve": tuple(trial.curve), "peak_memory_mb": true["memory"]}
            event = trial.curve[-1] | measured_
            if watch is not None and step < steps and watch(event):
                trial.status, trial.seconds = "stopped", row["seconds"] * scale
                trial.train_seconds = trial.seconds
                break
        return trial


def usual(place: Sequence[Any], name: str) -> float:
    return float(np.median([getattr(t, name) for t in place]))


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Squared, in units of the kernel: octaves of the learning rate, half as much for sizes, a half for choices."""
    from metapeft.search.pareto import searched

    total = (math.log(a["learning_rate"] / b["learning_rate"]) / OCTAVE) ** 2 / 2
    for name in searched(a["method"]):
        x, y = a.get(name), b.get(name)
        if name in ("learning_rate", "batch_size", "warmup", "dropout") or x == y:
            continue
        if isinstance(x, int | float) and isinstance(y, int | float) and x > 0 and y > 0:
            total += 0.25 * (math.log(x / y) / OCTAVE) ** 2 / 2
        else:
            total += 0.5
    return total


def replayed(trials: Sequence[Any], place: list[Any], seeds: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Every strategy on one task, with the experience of the other families."""
    from metapeft.search import stopping
    from metapeft.search.pareto import seed_deviation

    task, began = place[0], time.perf_counter()
    family = families().get(task.task, task.task)
    others = [t for t in trials if families().get(t.task, t.task) != family and t.task_version != task.task_version]
    start, first = advice(others, task, count)
    rule = stopping.calibrated(others)
    deviation = seed_deviation(others)
    deviation = deviation if math.isfinite(deviation) else SEED_DEVIATION
    rows = []
    for seed in seeds:
        for strategy in STRATEGIES:
            world = World(place, deviation, seed)
            found = run_strategy(strategy, world, seed, count, start, first, rule)
            rows.append(measured(strategy, world, seed, found))
    worst = [max(row["worst"][i] for row in rows) for i in (0, 1)]
    for row in rows:
        row["hypervolume"] = hypervolumes(row.pop("points"), worst)
        row["false_stops"], row["stops"] = row.pop("stopped")
    say(f"{task.task}: {len(seeds) * len(STRATEGIES)} sweeps replayed in {time.perf_counter() - began:.0f} s;"
        f" starts: {len(start)}, stop rule alpha {rule.alpha} ({rule.replayed.stops} stops,"
        f" {rule.replayed.false_stops} false in its replay)")  # fmt: skip
    return rows


def advice(others: Sequence[Any], task: Any, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Where a warm sweep starts, and the first recommended configuration: what metapeft says of a task never tried."""
    from metapeft.meta import evidence, portfolio
    from metapeft.meta.fitting import fit
    from metapeft.meta.forecast import forecast
    from metapeft.meta.model import Conditioned
    from metapeft.meta.recommendation import LEAST_SEEN, LEAST_TASKS, TOGETHER
    from metapeft.profiling import every_profile
    from metapeft.search.warm import nearest_fronts, warm_start

    features = {place: profile.features for place, profile in every_profile().items()}
    observed = evidence.gather(others, features)
    if len({o.task.version for o in observed}) < LEAST_TASKS:
        observed = []
    tasks: dict[str, set[str]] = {}
    configurations: dict[str, dict[str, Any]] = {}
    for o in observed:
        key = evidence.key(o.configuration)
        tasks.setdefault(key, set()).add(o.task.version)
        configurations[key] = o.configuration
    often = [configurations[key] for key in sorted(tasks) if len(tasks[key]) >= LEAST_SEEN]
    candidates = {evidence.key(c): evidence.complete(c) for c in (*portfolio.portfolio(DEPTH), *often)}
    listed = list(candidates.values())
    model = fit(observed)
    here = evidence.Known(
        task.task_version, task.backbone, task.task, families().get(task.task, task.task), task.train_examples,
        features.get((task.task_version, task.backbone)),
    )  # fmt: skip
    untuned = (task.untuned_score.value, 0.0) if task.untuned_score else (0.0, 0.1)
    tests = task.score.n if task.score else 300
    told = forecast(Conditioned(model, observed), here, listed, task.budget, untuned, tests)
    ranked = [listed[i] for i in np.argsort(-told.mean, kind="stable")]
    together = [listed[i] for i in told.together(TOGETHER, np.zeros(len(listed)))]
    profiled = {o.task for o in observed if o.task.features is not None}
    nearest: list[str] = []
    if profiled and here.features is not None:
        near = list(profiled)
        similarity = model.metric.similarity([here], near, model.length)[0]
        nearest = list(dict.fromkeys(near[i].name for i in np.argsort(-similarity, kind="stable")))
    predict = expected(others, listed, told.mean)
    return warm_start(together, ranked, nearest_fronts(others, nearest), count, predict), ranked[0]


def expected(others: Sequence[Any], listed: Sequence[dict[str, Any]], means: np.ndarray) -> Any:
    """Score as predicted for the nearest listed configuration of the method; costs relative to a task's usual ones, as
    on the other tasks (the product predicts them from the task's profile)."""
    by_task: dict[str, list[Any]] = {}
    for trial in others:
        if known(trial):
            by_task.setdefault(trial.task_version, []).append(trial)
    relative = [
        replace(
            t,
            train_seconds=t.train_seconds / usual(place, "train_seconds"),
            peak_memory_mb=t.peak_memory_mb / usual(place, "peak_memory_mb"),
        )
        for place in by_task.values()
        for t in place
    ]
    costs = World(relative, 0.0) if relative else None

    def predict(configuration: dict[str, Any]) -> tuple[float, float, float] | None:
        from metapeft.training.configuration import full

        values = full(configuration)
        same = [i for i, c in enumerate(listed) if c["method"] == values["method"]]
        if costs is None or not same:
            return None
        near = min(same, key=lambda i: distance(values, listed[i]))
        true = costs.truth(values)
        return float(means[near]), true["seconds"], true["memory"]

    return predict


def families() -> dict[str, str]:
    from metapeft.meta import evidence

    return evidence.families()


def run_strategy(
    strategy: str, world: World, seed: int, count: int, start: list[dict[str, Any]], first: dict[str, Any], rule: Any
) -> list[Any]:
    """The trials in their order."""
    from metapeft.data.task import Example, Task
    from metapeft.search import sweep
    from metapeft.search.slots import FOLDER
    from metapeft.settings import Settings, SweepSettings
    from metapeft.training.configuration import full

    record = world.place[0]
    steps = record.budget
    if strategy == "recommended":
        return [world(full(first), seed, steps, "recommended")]
    if strategy in ("tpe", "nsga2", "random"):
        return plain(strategy, world, seed, count, steps)
    row = Example("text", "label")
    task = Task(record.task, record.task_version, "classification", "accuracy", (row,), (row,), (row,))
    chosen = SweepSettings(
        trials=2 * count if strategy == "warm" else count,
        steps=steps,
        repeats=None if strategy == "repeats" else 0,
        warm=strategy != "cold",
    )
    settings = Settings(seed=seed, backbone=record.backbone, sweep=chosen)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {FOLDER: folder}):
        # FOLDER: what trains nothing needs none of the machine's places.
        storage = f"sqlite:///{folder}/study.db"
        warm = start if strategy in ("warm", "repeats") else ()
        return sweep.sweep(world, task, settings, warm_start=warm, storage=storage, rule=rule).trials


def plain(strategy: str, world: World, seed: int, count: int, steps: int) -> list[Any]:
    """Optuna as people use it: failed trainings are told the untuned score."""
    import optuna

    from metapeft.search import spaces
    from metapeft.training.configuration import full
    from metapeft.training.trial import trial_id

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers: dict[str, Callable[[], Any]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=10, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=samplers[strategy]())
    space, found = spaces.space(), []
    for _ in range(count):
        asked = study.ask()
        configuration = full(spaces.suggest(asked, space))
        record = world.place[0]
        identity = trial_id(record.task, record.task_version, record.backbone, configuration, seed, steps, 1)
        trial = world(configuration, seed, steps, identity)
        value = trial.validation.value if trial.validation else world.untuned
        study.tell(asked, (value, trial.train_seconds, trial.peak_memory_mb))
        found.append(trial)
    return found


def measured(strategy: str, world: World, seed: int, found: list[Any]) -> dict[str, Any]:
    """What one sweep came to, in truth."""
    from metapeft.search import pareto

    seconds, best, chosen, points = [], [], [], []
    spent, top = 0.0, world.untuned
    for index, trial in enumerate(found):
        spent += trial.seconds
        seconds.append(spent)
        true = world.truth(trial.configuration)
        if trial.status == "ok":
            top = max(top, true["score"])
        points.append((true["score"], true["seconds"], true["memory"]) if trial.status == "ok" else None)
        best.append(top)
        named = pareto.named([replace(t, untuned_score=None) for t in found[: index + 1]])
        accurate = named.get("most accurate")
        chosen.append(world.truth(accurate.configuration)["score"] if accurate else world.untuned)
    inside = [p for p in points if p is not None]
    return {
        "task": world.place[0].task,
        "strategy": strategy,
        "seed": seed,
        "tests": world.place[0].score.n if world.place[0].score else world.examples,
        "seconds": seconds,
        "best": best,
        "chosen": chosen,
        "points": points,
        "worst": [max((p[i] for p in inside), default=0.0) for i in (1, 2)],
        "stopped": false_stops(world, found),
    }


def false_stops(world: World, found: Sequence[Any]) -> tuple[int, int]:
    """(false stops, stops): a stopped trial that, run to its end, beats all that was as cheap until then, is false."""
    from metapeft.search import pareto
    from metapeft.search.stopping import best_as_cheap

    wrong = stops = 0
    for index, trial in enumerate(found):
        if trial.status != "stopped":
            continue
        stops += 1
        whole = world(trial.configuration, trial.seed, trial.budget, trial.id)
        score, seconds, memory = pareto.objectives(whole) or (0.0, math.inf, math.inf)
        needed = best_as_cheap(found[:index], seconds, memory)
        wrong += needed is None or score > needed
    return wrong, stops


def hypervolumes(points: Sequence[Any], worst: Sequence[float]) -> list[float]:
    """After each trial; costs as shares of a tenth more than the worst that any strategy tried on this task."""
    from metapeft.search import pareto

    shares: list[float] = []
    inside: list[tuple[float, ...]] = []
    for point in points:
        if point is not None:
            inside.append((1 - point[0], point[1] / (1.1 * worst[0]), point[2] / (1.1 * worst[1])))
        shares.append(pareto.hypervolume(inside, (1.0, 1.0, 1.0)))
    return shares


def judged(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The protocol's targets; None where nothing was replayed."""
    by: dict[tuple[str, int, str], dict[str, Any]] = {(r["task"], r["seed"], r["strategy"]): r for r in rows}
    tasks = sorted({r["task"] for r in rows})
    seeds = sorted({r["seed"] for r in rows})
    share, volume, longer, early = [], [], [], []
    for task in tasks:
        times, ratios, later, soon = [], [], [], []
        for seed in seeds:
            warm, cold = by[task, seed, "warm"], by[task, seed, "tpe"]
            goal = cold["hypervolume"][-1]
            reached = next((s for s, v in zip(warm["seconds"], warm["hypervolume"], strict=True) if v >= goal), None)
            times.append(reached / cold["seconds"][-1] if reached is not None else math.inf)
            ratios.append(warm["hypervolume"][min(count, len(warm["best"])) - 1] / max(goal, 1e-9))
            within = [v for s, v in zip(warm["seconds"], warm["hypervolume"], strict=True) if s <= cold["seconds"][-1]]
            later.append(max(within, default=0.0) / max(goal, 1e-9))
            soon.append(close(warm))
        share.append(statistics.median(times))
        volume.append(statistics.mean(ratios))
        longer.append(statistics.mean(later))
        early.append(statistics.mean(soon) >= 0.5)
    stops = sum(r["stops"] for r in rows if r["strategy"] in ("warm", "repeats", "cold"))
    wrong = sum(r["false_stops"] for r in rows if r["strategy"] in ("warm", "repeats", "cold"))
    measured_: list[tuple[str, float | None, float, bool]] = [
        (f"share of cold TPE's wall time ({count} trials) in which warm has its hypervolume, median over tasks",
         statistics.median(share) if share else None, 0.25, True),
        ("hypervolume of warm over that of cold TPE in the wall time of the latter, median over tasks",
         statistics.median(longer) if longer else None, 1.0, False),
        (f"hypervolume of warm over that of cold TPE after {count} trials each, median over tasks",
         statistics.median(volume) if volume else None, 1.0, False),
        (f"tasks on which warm is within 5 % of its final best score after {FIRST} trials, share",
         statistics.mean(early) if early else None, 0.8, False),
        ("false stops, share of stops", wrong / stops if stops else None, 0.05, True),
    ]  # fmt: skip
    return [
        {
            "name": name,
            "value": value if value is None or math.isfinite(value) else None,
            "target": target,
            "met": value is not None and (value <= target if below else value >= target),
        }
        for name, value, target, below in measured_
    ]


def close(row: dict[str, Any]) -> bool:
    """Whether the first trials come within 5 % of the final best score."""
    return bool(row["best"][min(FIRST, len(row["best"])) - 1] >= 0.95 * row["best"][-1])


def behind(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, float, float]]:
    """Tasks on which most warm sweeps are not `close`: best score after FIRST trials, at the end, and what lies between
    in standard errors of a score on the task's test split, which every recorded score, and so the surrogate, has."""
    found = []
    for task in sorted({r["task"] for r in rows}):
        mine = [r for r in rows if r["task"] == task and r["strategy"] == "warm"]
        if statistics.mean(close(r) for r in mine) < 0.5:
            early = statistics.mean(r["best"][min(FIRST, len(r["best"])) - 1] for r in mine)
            final = statistics.mean(r["best"][-1] for r in mine)
            error = math.sqrt(max(final * (1 - final), 0.25 / mine[0]["tests"]) / mine[0]["tests"])
            found.append((task, early, final, (final - early) / error))
    return found


def table(rows: Sequence[dict[str, Any]], count: int) -> str:
    """Means over tasks and seeds at a few points of the sweeps."""
    marks = [n for n in (1, FIRST, 10, 20, count) if n <= count]
    head = "| strategy | " + " | ".join(f"hypervolume, {n} trials" for n in marks)
    head += f" | best score, {FIRST} | best score, end | score of the reported best | wall s | stopped |"
    lines = [head, "|---|" + "---|" * (len(marks) + 5)]
    for strategy in STRATEGIES:
        mine = [r for r in rows if r["strategy"] == strategy]
        if not mine:
            continue

        def at(name: str, n: int, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.mean(r[name][min(n, len(r[name])) - 1] for r in mine)

        cells = [f"{at('hypervolume', n):.3f}" for n in marks]
        cells += [f"{at('best', FIRST):.3f}", f"{at('best', count):.3f}", f"{at('chosen', count):.3f}"]
        cells += [f"{at('seconds', count):.0f}", f"{sum(r['stops'] for r in mine) / len(mine):.1f}"]
        lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def swept(task: str, count: int, steps: int) -> list[dict[str, Any]]:
    """A task swept for real, warm, and cold without stopping; by validation scores. Nothing is known of its family."""
    from metapeft import api
    from metapeft.meta.experience import Experience
    from metapeft.search import pareto
    from metapeft.settings import home

    def others(self: Experience, everything: Any = Experience.trials) -> list[Any]:
        return [t for t in everything(self) if families().get(t.task, t.task) != families()[task]]

    found = {}
    for strategy, options in (("warm", {}), ("cold tpe", {"warm": False, "stop": False})):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("backbones", "data"):
                Path(folder, name).symlink_to((home() / name).resolve())
            with (
                mock.patch.dict(os.environ, {"METAPEFT_HOME": folder}),
                mock.patch.object(Experience, "trials", others),
            ):
                began = time.perf_counter()
                found[strategy] = api.sweep(task, trials=count, steps=steps, repeats=0, **options)  # type: ignore[arg-type]
        say(f"live {task}, {strategy}: {count} trials in {time.perf_counter() - began:.0f} s")
    worst = pareto.reference(t for result in found.values() for t in result.trials)
    rows = []
    for strategy, result in found.items():
        best: list[float] = []
        for trial in result.trials:
            point = pareto.objectives(trial)
            best.append(max([point[0] if point else 0.0, *best[-1:]]))
        rows.append(
            {
                "task": task,
                "strategy": strategy,
                "seconds": list(np.cumsum([t.seconds for t in result.trials])),
                "best": best,
                "hypervolume": pareto.progress(result.trials, worst),
                "stops": sum(t.status == "stopped" for t in result.trials),
            }
        )
    return rows


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
