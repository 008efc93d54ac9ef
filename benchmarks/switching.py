"""Does switching methods while training pay, and is anything forgotten?

    python benchmarks/switching.py [--quick] [--json FILE] [--tasks a,b] [--seeds 0,1,2] [--parts one,sequences]

one        each task trained with every method (its configuration that is expected to be best there), with the
           recommended one of them, and with switching from the recommended one; equal budgets in predicted seconds
wrong      switching from the method that did worst there on validation: the share of its regret that is recovered
sequences  tasks one after another, in several orders: naive, replay, EWC, L2 and an adapter per task
forecast   coverage of the 90 % intervals on the recorded curves of families left out

Nothing that is predicted for a task knows a trial of a task of its family, as in `metapeft meta evaluate`. Finished
trainings are kept (--records; default: METAPEFT_HOME/benchmarks/switching.jsonl), so an interrupted run continues;
cheap tasks come first, and every line of the result says how many tasks and seeds it rests on.
benchmarks/records/switching.jsonl holds what docs/switching.md reports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from metapeft.settings import home

TASKS = (
    "bb_plural",
    "irregular_plural",
    "name_gender",
    "country_region",
    "country_subregion",
    "country_demonym",
    "country_capital",
    "bb_past_tense",
    "misspelling_fix",
    "emoji_name_group",
    "trec6",
    "movie_title_genre",
)
ORDERS = (  # of the tasks of a sequence
    ("irregular_plural", "country_demonym", "name_gender", "bb_past_tense"),
    ("bb_past_tense", "name_gender", "country_demonym", "irregular_plural"),
    ("country_region", "bb_plural", "misspelling_fix", "country_capital", "emoji_name_group"),
)
METHODS = ("lora", "adalora", "prompt", "prefix", "p_tuning")
KEEPING = ("naive", "replay", "ewc", "l2", "adapters")
STEPS = 40  # of LoRA on every layer: what they cost is everybody's budget
PARTS = ("forecast", "one", "wrong", "sequences")


_records: list[Path] = []  # the file that this run goes by


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tasks, one seed, short trainings")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--records", type=Path, help="finished trainings are read from here and added here")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no new training begins after that")
    options = parser.parse_args()
    _records.append(options.records or home() / "benchmarks" / "switching.jsonl")
    tasks = options.tasks.split(",")[: 2 if options.quick else None]
    seeds = [int(s) for s in options.seeds.split(",")][: 1 if options.quick else None]
    steps = 12 if options.quick else options.steps
    parts = options.parts.split(",")
    until = time.monotonic() + options.max_seconds
    found: dict[str, Any] = {}
    if "forecast" in parts:
        found["forecast"] = forecast()
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for name in tasks if {"one", "wrong"} & set(parts) else ():
            rows += one_task(name, seed, steps, "wrong" in parts, until)
    found |= {"trainings": rows, **summary(rows)}
    if "sequences" in parts:
        orders = [ORDERS[0][:2]] if options.quick else ORDERS
        places = [(list(order), seed) for seed in seeds for order in orders]
        found["sequences"] = [row for order, seed in places for row in sequences(order, seed, steps, until)]
        found["kept"] = by_keeping(found["sequences"])
    from metapeft.runtime import describe

    found["targets"] = targets(found)
    record = {"machine": describe(), "command": " ".join(["python", "benchmarks/switching.py", *sys.argv[1:]]), **found}
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))
    return 0 if all(t["met"] for t in found["targets"]) else 1


def forecast() -> dict[str, Any]:
    """Coverage, by how much of the budget was left; each family by what all others say."""
    from metapeft.meta.knowledge import knowledge
    from metapeft.switching.forecast import calibrated, coverage, cross_checked, left_out

    known = knowledge()
    checked = cross_checked(left_out(known.trials, known.observations()))
    by = {left: [a for c, a in checked if abs(c.left - left) < 0.05] for left in (0.75, 0.5, 0.25)}
    chosen = calibrated([c for c, _ in checked])
    return {
        "moments": len(checked),
        "families": len({c.family for c, _ in checked}),
        "coverage": coverage([a for _, a in checked]),
        "by_share_left": {str(left): coverage(away) for left, away in by.items()},
        "caution": chosen.caution,
        "width": chosen.width,
    }


@lru_cache(maxsize=1)
def backbone() -> Any:
    from metapeft import backbones

    return backbones.load("smollm2-135m-instruct")


@lru_cache(maxsize=1)
def prepared(name: str) -> Any:
    """Session and profile of a task."""
    from metapeft.data import load_task
    from metapeft.profiling import profile
    from metapeft.settings import DataSettings
    from metapeft.training.evaluation import untuned
    from metapeft.training.session import Session

    task = load_task(name, DataSettings(max_train=600, max_validation=64, max_test=300))
    session = Session(backbone(), task)
    untuned(session, "test")
    untuned(session, "validation")
    return session, profile(task, backbone())


def one_task(name: str, seed: int, steps: int, wrong: bool, until: float) -> list[dict[str, Any]]:
    """Every arm of one task and seed, as far as time allows."""
    place = {"task": name, "seed": seed, "steps": steps}

    def arm(kind: str, work: Callable[[], dict[str, Any]], **more: Any) -> dict[str, Any] | None:
        return kept({**place, "arm": kind}, lambda: work() | more, until)

    plan = kept({**place, "arm": "plan", "seed": 0}, lambda: planned(name, steps), until)
    if plan is None:
        return []
    rows = []
    for method, choice in plan["choices"].items():
        recommended = method == plan["recommended"]
        row = arm(method, lambda c=choice: static(name, c, seed), recommended=recommended)  # type: ignore[misc]
        rows += [row] if row else []
    first = plan["choices"][plan["recommended"]]
    row = arm("switching", lambda: switched(name, first, seed, plan))
    rows += [row] if row else []
    measured = [r for r in rows if r["arm"] in METHODS]
    if wrong and len(measured) == len(METHODS):
        worst = min(measured, key=lambda r: r["validation"])["arm"]
        row = arm("from wrong", lambda: switched(name, plan["choices"][worst], seed, plan), start=worst)
        rows += [row] if row else []
    return rows


def planned(name: str, steps: int) -> dict[str, Any]:
    """Each method's configuration with the steps that the budget buys, and which of them is recommended. speed: of the
    machine, which every arm's steps are counted by, whatever it measures like later."""
    from metapeft.meta.evidence import complete
    from metapeft.profiling import speed as speeds

    speed = speeds.of(backbone())
    given = advised(name, {"method": "lora", "learning_rate": 1e-3}, steps, speed)
    budget = given.start.price.seconds(steps, 4)
    everything = [given.start, *given.others]
    means = given.forecaster.before([(complete(o.configuration), steps) for o in everything]).mean
    choices: dict[str, Any] = {}
    for mean, option in sorted(zip(means, everything, strict=True), key=lambda pair: -pair[0]):
        method = option.configuration["method"]
        choice = {"configuration": option.configuration, "steps": max(1, option.price.steps(budget, 4))}
        choices.setdefault(method, choice | {"expected": float(mean)})
    return {"budget": budget, "choices": choices, "recommended": next(iter(choices)), "speed": speed.to_json()}


def advised(name: str, start: dict[str, Any], steps: int, speed: Any, basis: Any = None) -> Any:
    from metapeft.switching.advice import advice

    session, profile = prepared(name)
    untuned, family = session.untuned["validation"].value, session.task.family
    model = fitted_without(family)
    return advice(session.task, profile, start, steps, untuned, speed=speed, basis=basis, without={family}, model=model)


@lru_cache(maxsize=1)
def fitted_without(family: str) -> Any:
    """The meta-model of all other families, as in `metapeft meta evaluate`."""
    from metapeft.meta.evidence import without
    from metapeft.meta.fitting import fit
    from metapeft.meta.knowledge import knowledge

    return fit(without(knowledge().observations(), {family}))


def static(name: str, choice: dict[str, Any], seed: int) -> dict[str, Any]:
    from metapeft.training.trainer import run_trial

    session, _ = prepared(name)
    return outcome(run_trial(session, choice["configuration"], steps=choice["steps"], seed=seed))


def switched(name: str, choice: dict[str, Any], seed: int, plan: dict[str, Any]) -> dict[str, Any]:
    from metapeft.profiling.speed import Speed
    from metapeft.switching import run
    from metapeft.switching.decide import Policy

    session, _ = prepared(name)
    start, steps, speed = choice["configuration"], choice["steps"], Speed(**plan["speed"])
    folder = home() / "benchmarks" / f"switching-{run.identity(session, start, steps, seed, Policy())}"
    trial, record = run.train(
        session,
        start,
        lambda basis: advised(name, start, steps, speed, basis),
        steps=steps,
        seconds=plan["budget"],
        folder=folder,
        seed=seed,
    )
    legs = [
        {"method": leg.configuration["method"], "how": leg.how, "change": leg.change, "undone": leg.undone}
        for leg in record.legs
    ]
    return outcome(trial) | {"legs": legs, "back": record.back, "decisions": record.decisions}


def outcome(trial: Any) -> dict[str, Any]:
    score = trial.score.value if trial.score else trial.untuned_score.value
    return {
        "score": score,
        "untuned": trial.untuned_score.value,
        "validation": trial.validation.value if trial.validation else 0.0,
        "status": trial.status,
        "seconds": trial.seconds,
        "cpu_seconds": trial.cpu_seconds,
    }


def sequences(order: list[str], seed: int, steps: int, until: float) -> list[dict[str, Any]]:
    """The same order of tasks with each way of keeping what was learned."""
    from metapeft.data import load_task
    from metapeft.settings import DataSettings
    from metapeft.switching.sequence import Keep, train_sequence

    rows = []
    for kind in KEEPING:

        def work(kind: str = kind) -> dict[str, Any]:
            data = DataSettings(max_train=300, max_validation=64, max_test=150)
            tasks = [load_task(name, data) for name in order]
            start = {"method": "lora", "learning_rate": 1e-3}
            return train_sequence(backbone(), tasks, start, Keep(kind), steps=steps, seed=seed).to_json()  # type: ignore[arg-type]

        row = kept({"arm": f"sequence {kind}", "order": order, "seed": seed, "steps": steps}, work, until)
        rows += [row] if row else []
    return rows


def by_keeping(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the orders and seeds that every way of keeping has gone through."""
    ways: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        ways.setdefault(row["arm"].removeprefix("sequence "), {})[*row["order"], row["seed"]] = row
    runs = set.intersection(*(set(found) for found in ways.values())) if len(ways) == len(KEEPING) else set()
    numbers = ("average_accuracy", "backward_transfer", "forgetting", "drift")
    about = {"orders": len({run[:-1] for run in runs}), "runs": len(runs)}
    return [
        {"kept_by": kind} | about | {n: statistics.mean(found[run][n] for run in runs) for n in numbers}
        for kind, found in ways.items()
        if runs
    ]


def kept(place: dict[str, Any], work: Callable[[], dict[str, Any]], until: float) -> dict[str, Any] | None:
    """The result that is on file, else a new one; None: no time is left."""
    path = _records[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line) if line.endswith("}") else {}  # a kill may have cut the last one
        if all(row.get(k) == v for k, v in place.items()):
            return dict(row)
    if time.monotonic() > until:
        return None
    row = place | work()
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
    print({k: v for k, v in row.items() if k not in ("decisions", "choices")}, file=sys.stderr, flush=True)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean regret of every arm, over the tasks and seeds where all of them are there."""
    places: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        places.setdefault((row["task"], row["seed"]), {})[row["arm"]] = row
    whole = [arms for arms in places.values() if {*METHODS, "switching"} <= arms.keys()]
    regrets: dict[str, list[float]] = {}
    for arms in whole:
        best = max(arms[m]["score"] for m in METHODS)
        for method in METHODS:
            regrets.setdefault(method, []).append(best - arms[method]["score"])
            if arms[method]["recommended"]:
                regrets.setdefault("recommended", []).append(best - arms[method]["score"])
        regrets.setdefault("switching", []).append(best - arms["switching"]["score"])
    behind = [
        a - b for a, b in zip(regrets.get("switching", []), regrets.get("recommended", []), strict=True)
    ]  # positive: switching is worse
    lost, regained = 0.0, 0.0
    wrong = [arms for arms in whole if "from wrong" in arms]
    parts: dict[str, list[tuple[float, float]]] = {}  # by task: lost, regained
    for arms in wrong:
        best, start = max(arms[m]["score"] for m in METHODS), arms[arms["from wrong"]["start"]]["score"]
        lost += best - start
        regained += arms["from wrong"]["score"] - start
        parts.setdefault(arms["from wrong"]["task"], []).append((best - start, arms["from wrong"]["score"] - start))
    return {
        "places": len(whole),
        "regret": {arm: statistics.mean(values) for arm, values in regrets.items()},
        "switching_behind_recommended": spread(behind),
        "wrong": {"places": len(wrong), "lost": lost, "regained": regained, "share": regained / lost if lost else None}
        | {"share_90": elsewhere(list(parts.values()))},
        "cpu_seconds": {
            arm: statistics.mean(arms[arm]["cpu_seconds"] for arms in whole) for arm in (*METHODS, "switching") if whole
        },
    }


def spread(values: list[float]) -> dict[str, float] | None:
    """Mean and standard error."""
    if len(values) < 2:
        return None
    return {"mean": statistics.mean(values), "standard_error": statistics.stdev(values) / math.sqrt(len(values))}


def elsewhere(parts: list[list[tuple[float, float]]], draws: int = 4000) -> list[float]:
    """90 % interval of the share that is recovered, over as many tasks drawn from these (bootstrap; seeded)."""
    import random

    chance = random.Random(0)
    shares = []
    for _ in range(draws if parts else 0):
        rows = [row for _ in parts for row in chance.choice(parts)]
        if lost := sum(row[0] for row in rows):
            shares.append(sum(row[1] for row in rows) / lost)
    shares.sort()
    return [shares[int(len(shares) * q)] for q in (0.05, 0.95)] if shares else []


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def target(name: str, value: float | None, met: bool, wanted: str) -> None:
        rows.append({"name": name, "value": value, "target": wanted, "met": met})

    if "forecast" in found:
        share = found["forecast"]["coverage"]
        target("coverage of 90 % intervals", share, 0.85 <= share <= 0.95, "0.85 to 0.95")
    if found["places"]:
        regret = found["regret"]
        least = min(regret[m] for m in METHODS)
        target("(a) mean regret of switching", regret["switching"], regret["switching"] < least, f"below {least:.4f}")
        behind = found["switching_behind_recommended"]
        if behind:
            met = behind["mean"] <= 1.96 * behind["standard_error"]
            target("(a) behind the recommendation", behind["mean"], met, "not significantly above 0")
    if found["wrong"]["share"] is not None:
        low, high = found["wrong"]["share_90"]
        name = f"(c) regret recovered ({low:.2f} to {high:.2f} over other tasks, 90 %)"
        target(name, found["wrong"]["share"], found["wrong"]["share"] >= 0.7, "at least 0.7")
    for row in found.get("kept", ()):
        if row["kept_by"] == "adapters":
            target("(b) forgetting, default", row["forgetting"], row["forgetting"] <= 0.01, "at most 0.01")
        if row["kept_by"] == "naive":
            target("(b) forgetting, naive", row["forgetting"], row["forgetting"] >= 0.05, "at least 0.05")
    return rows


def markdown(found: dict[str, Any]) -> str:
    lines = [f"Tasks and seeds with every arm: {found['places']}", ""]
    if found["places"]:
        lines += ["| arm | mean regret | processor seconds |", "|---|---|---|"]
        for arm, regret in sorted(found["regret"].items(), key=lambda pair: pair[1]):
            spent = found["cpu_seconds"].get(arm)
            lines.append(f"| {arm} | {regret:.4f} | {f'{spent:.1f}' if spent else ''} |")
        lines.append("")
    if found.get("kept"):
        lines += [
            f"Orders of tasks: {found['kept'][0]['orders']}; with each seed: {found['kept'][0]['runs']} sequences",
            "",
            "| kept by | average accuracy | backward transfer | forgetting | perplexity drift |",
            "|---|---|---|---|---|",
        ]
        for row in found["kept"]:
            numbers = (row["average_accuracy"], row["backward_transfer"], row["forgetting"], row["drift"])
            said = " | ".join(f"{n:.4f}" for n in numbers)
            lines.append(f"| {row['kept_by']} | {said} |")
        lines.append("")
    lines += ["| target | value | asked for | met |", "|---|---|---|---|"]
    for t in found["targets"]:
        value = "" if t["value"] is None else f"{t['value']:.4f}"
        lines.append(f"| {t['name']} | {value} | {t['target']} | {'yes' if t['met'] else 'no'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
