"""After how many steps exactly? The cells of benchmarks/fewshot.py whose speed hangs on where its looks fall, closer.

    python benchmarks/fewshot_looks.py --records benchmarks/records/fewshot.jsonl [--max-seconds S]

A cell looks at the test split after 10, 20 and 40 steps. Where neither the automatic choice's start nor the untuned
backbone has cold LoRA's final score, both are trained on all shots again, as in the cell, and looked at after 1, 2, 3
steps and so on until they first have it. Written beside the records (NAME_looks.jsonl), one line as each ends; what is
there is not done again. `fewshot.py --only report` takes it from there.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewshot
import numpy as np

from metapeft.fewshot import choose
from metapeft.fewshot.choose import Strategy
from metapeft.fewshot.measure import Answers, answers

LOOKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 28, 33, 40)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--max-seconds", type=float, default=math.inf)
    options = parser.parse_args()
    until = time.monotonic() + options.max_seconds
    fewshot.place(fewshot.TASKS, fewshot.ROUNDS, options.records)
    cells = fewshot.read()
    if not cells:
        fewshot.say(f"no cell in {options.records} has ended yet")
        return 1
    fewshot.report(cells)  # says what is chosen in each
    lora = fewshot.stronger(cells)
    for c in cells:
        goal = c["scores"][lora]
        if c["scores"]["zero-shot"] >= goal or c["choice"] == "zero-shot":
            continue
        known = {name: fewshot.approach(c, name, goal) for name in (lora, c["choice"])}
        if not fewshot.unsettled(*known.values()):
            continue
        for name, so_far in known.items():
            done = (c["task"], c["shots"], c["draw"], name, goal) in fewshot.closer_looks()
            if not done and time.monotonic() < until:
                look(c, name, goal, so_far)
    return 0


def look(c: dict[str, Any], name: str, goal: float, so_far: fewshot.Approach) -> None:
    """Trains as in the cell, with more looks, until one has the score; appends what was found."""
    at = [step for step in LOOKS if step <= so_far.step]
    found: dict[int, float] = {}
    seconds, spent, begin = 0.0, 0.0, time.perf_counter()

    def measure(session: Any, adapter: Any) -> Answers:
        nonlocal seconds, spent
        if any(score >= goal for score in found.values()):
            return Answers(np.zeros(0), np.zeros(0), np.zeros(0))
        now = time.perf_counter()
        answered = answers(session, adapter, "test")
        found[where[len(found)]] = float(answered.hit.mean())
        seconds = now - begin - spent
        spent += time.perf_counter() - now
        return answered

    _, session = fewshot.met(c["task"], c["shots"], c["draw"])
    way = strategy(c, name, session)
    where = at if way.start is None else [0, *at]  # what begins elsewhere is looked at before the first step, too
    choose.fitted(way, session, range(c["shots"]), at, measure)
    with_it = [step for step, score in found.items() if score >= goal]
    without = [step for step, score in found.items() if score < goal]
    record = {key: c[key] for key in ("task", "shots", "draw", "learned")} | {"strategy": name, "goal": goal}
    record |= {"step": with_it[0] if with_it else None, "before": max([0, *without]), "seconds": round(seconds, 2)}
    record["scores"] = {str(step): round(score, 4) for step, score in found.items()}
    fewshot.append(fewshot.looks_path(), record)
    fewshot.say(f"{c['task']} {c['shots']} shots, draw {c['draw']}: {name} has {goal:.2f} after {record['step']} steps")


def strategy(c: dict[str, Any], name: str, session: Any) -> Strategy:
    """As in the cell: with the neighbours that it had."""
    from metapeft.fewshot.strategies import strategies
    from metapeft.meta import library
    from metapeft.profiling import profile

    if name == fewshot.RIVAL:
        return Strategy(fewshot.RIVAL, fewshot.RIVAL_CONFIGURATION)
    every = {}
    for found in library.find(profile(session.task, fewshot.backbone()), 10**6, without={c["task"], c["family"]}):
        every[found.entry.trial.task, found.entry.trial.method] = found
    near = [replace(every[task, method], similarity=likeness) for task, method, likeness in c["near"]]
    ways = strategies(session, near, fewshot.meta_learned(c["family"]))
    return next(way for way in ways if way.name == name)


if __name__ == "__main__":
    raise SystemExit(main())
