"""Learning from few examples: every strategy, and the automatic choice, on tasks of families left out of all learning.

    python benchmarks/fewshot.py [--quick] [--json FILE] [--markdown FILE] [--tasks a,b] [--shots 4,16] [--draws N]
                                 [--max-seconds S] [--only prepare|run|report]

Before a task is met, the library holds adapters of the other tasks, trained on up to 600 examples each, and starts are
meta-learned from the half of the tasks that is of other families. For every task, number of shots and draw of shots,
every strategy is cross-validated on the shots and, trained on all of them, scored on the test split; the automatic
choice sees the former alone. Results are kept in METAPEFT_HOME/benchmarks/fewshot, one line per cell as it ends, the
cheapest cells first: an interrupted run continues, and `--only report` reports what there is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from metapeft.fewshot import choose, reptile
from metapeft.fewshot.choose import COLD, Strategy
from metapeft.settings import DataSettings, home

# Short rows, so that a cell takes minutes. Cheapest first.
TASKS = (
    "country_region", "name_gender", "bb_plural", "country_subregion", "irregular_plural", "emoji_name_group",
    "country_capital", "country_demonym", "movie_title_genre", "misspelling_fix", "trec6", "bb_past_tense",
    "bb_qa_wikidata", "bb_sports_understanding", "bb_strategyqa",
)  # fmt: skip
HALF = ("knowledge",)  # families of one half; starts for it are learned from all other tasks, and the other way round
SHOTS, DRAWS = (4, 8, 16, 32, 64), 5
QUICK = (("country_region",), (4,), 1)
DATA = DataSettings(max_train=600, max_validation=64, max_test=100)
STEPS = 40
ROUNDS = 120  # of Reptile
METHODS = ("lora", "prefix")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one task, one draw of 4 shots, a small library")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--shots", default=",".join(map(str, SHOTS)))
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--max-seconds", type=float, default=math.inf)
    parser.add_argument("--only", choices=("prepare", "run", "report"))
    options = parser.parse_args()
    until = time.monotonic() + options.max_seconds
    names = options.tasks.split(",")
    if options.only in (None, "prepare"):
        prepare(QUICK_LIBRARY if options.quick else TASKS, 12 if options.quick else ROUNDS, until)
    return 0


QUICK_LIBRARY = ("country_region", "name_gender", "bb_plural")
_loaded: dict[str, Any] = {}


def backbone() -> Any:
    from metapeft import backbones

    if "" not in _loaded:
        _loaded[""] = backbones.load("smollm2-135m-instruct")
    return _loaded[""]


def task(name: str) -> Any:
    from metapeft.data import load_task

    if name not in _loaded:
        _loaded[name] = load_task(name, DATA)
    return _loaded[name]


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def prepare(names: Sequence[str], rounds: int, until: float) -> None:
    """The library, and the meta-learned starts of both halves."""
    for name in names:
        for method in METHODS:
            if time.monotonic() < until:
                teach(name, method)
    for method in METHODS:
        for knowledge in (True, False):
            learned_from = [n for n in names if (task(n).family in HALF) == knowledge]
            if time.monotonic() < until and learned_from:
                learn_start(learned_from, method, knowledge, rounds, until)


def teach(name: str, method: str) -> None:
    """One adapter for the library, trained as `metapeft train` would."""
    import shutil

    from metapeft.meta import library
    from metapeft.profiling import profile
    from metapeft.training.session import Session
    from metapeft.training.trainer import run_trial

    have = {(e.trial.task_version, e.trial.method) for e in library.entries()}
    if (task(name).version, method) in have:
        return
    begin = time.monotonic()
    folder = home() / "benchmarks" / "fewshot" / "teaching"
    session = Session(backbone(), task(name))
    trial = run_trial(session, COLD[method], steps=STEPS, folder=folder, test=False)
    library.offer(folder, trial, task(name), profile(task(name), backbone()))
    shutil.rmtree(folder, ignore_errors=True)
    reached = trial.validation.value if trial.validation else math.nan
    say(f"library: {name} {method} {trial.status} {reached:.3f} in {time.monotonic() - begin:.0f} s")


def start_folder(method: str, knowledge: bool) -> Path:
    half = "knowledge" if knowledge else "others"
    return home() / "benchmarks" / "fewshot" / "starts" / f"{method}-from-{half}"


def learn_start(names: Sequence[str], method: str, knowledge: bool, rounds: int, until: float) -> None:
    folder = start_folder(method, knowledge)

    def report(number: int, loss: float) -> bool:
        if number % 10 == 0:
            say(f"start: {folder.name} round {number} of {rounds}, loss {loss:.2f}")
        return time.monotonic() > until

    reptile.reptile(
        backbone(), [task(n) for n in names], COLD[method], rounds=rounds, folder=folder, report=report
    )


if __name__ == "__main__":
    raise SystemExit(main())
