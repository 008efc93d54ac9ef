"""Learning from few examples: every strategy, and the automatic choice, on tasks of families left out of all learning.

    python benchmarks/fewshot.py [--quick] [--json FILE] [--markdown FILE] [--tasks a,b] [--shots 4,16] [--draws N]
                                 [--library a,b] [--rounds N] [--max-seconds S] [--priors FILE]
                                 [--only prepare|run|report] [--fill]

Before a task is met, the library holds adapters of the other tasks, trained on up to 600 examples each, and starts are
meta-learned from the half of the tasks that is of other families. For every task, number of shots and draw of shots,
every strategy is trained on the shots and scored on the test split; the automatic choice cross-validates those that
are worth trying, and sees nothing but that and priors made of the cells of other families. Results are kept (--records;
default: in METAPEFT_HOME/benchmarks/fewshot), one line per cell as it ends, the cheapest cells first: an interrupted
run continues, and `--only report` reports what there is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from metapeft.fewshot import choose, worth
from metapeft.fewshot.choose import AT, Held, Prior, Strategy
from metapeft.fewshot.measure import Answers
from metapeft.fewshot.optimism import optimism
from metapeft.fewshot.worth import Together
from metapeft.settings import DataSettings, home

BACKBONE = "smollm2-135m-instruct"
# Short rows, so that a cell takes minutes; the families take turns.
TASKS = (
    "country_region", "name_gender", "bb_plural", "misspelling_fix", "country_capital", "emoji_name_group", "trec6",
    "country_subregion", "irregular_plural", "bb_sports_understanding", "bb_strategyqa", "movie_title_genre",
    "country_demonym", "bb_past_tense", "bb_qa_wikidata",
)  # fmt: skip
HALF = ("knowledge",)  # families of one half; starts for it are learned from all other tasks, and the other way round
SHOTS, DRAWS = (4, 8, 16, 32, 64), 5
DATA = DataSettings(max_train=600, max_validation=64, max_test=100)
STEPS, ROUNDS = 40, 120  # of the library's adapters; of Reptile
TOWARDS_NONE = 0.1  # of the correlations between strategies, which few cells show
LEAST, LEAST_DEVIATION = 3, 0.1  # cells of other families before they make a prior; what it leaves open
SURE = (0.99, 0.9, 0.75, 0.0)  # how sure it is that it gains, in classes from here up
FEW = 16  # shots up to which the second target counts
# LoRA as the experience has it best on tasks with hundreds of examples: what the automatic choice is compared with,
# beside the cheaper cold LoRA that it may choose.
RIVAL = "cold lora, all layers"
RIVAL_CONFIGURATION = {"method": "lora", "learning_rate": 1e-3, "rank": 8, "alpha": 16.0, "layers": 0}
QUICK_LIBRARY = ["name_gender", "country_region", "bb_plural"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one task, one draw of 4 shots, a small library")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--shots", default=",".join(map(str, SHOTS)))
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--library", default=",".join(TASKS), help="tasks to learn from beforehand")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of Reptile, for each start")
    parser.add_argument("--max-seconds", type=float, default=math.inf)
    parser.add_argument("--priors", type=Path, help="write what the strategies gained here, for `metapeft adapt`")
    parser.add_argument("--only", choices=("prepare", "run", "report"))
    parser.add_argument("--records", type=Path, help="finished cells are read from here and added here")
    parser.add_argument(
        "--fill", action="store_true", help="run what finished cells lack (a new strategy), and no others"
    )
    options = parser.parse_args()
    until = time.monotonic() + options.max_seconds
    names, shots = options.tasks.split(","), [int(k) for k in options.shots.split(",")]
    draws, library, rounds = options.draws, options.library.split(","), options.rounds
    if options.quick:
        names, shots, draws, library, rounds = ["name_gender"], [4], 1, QUICK_LIBRARY, 10
    place(library, rounds, options.records)
    if options.only in (None, "prepare"):
        prepare(library, rounds, until)
    if options.only in (None, "run"):
        for draw in range(draws):
            for count in shots:
                for name in names:
                    if time.monotonic() < until:
                        cell(name, count, draw, library, options.fill)
    if options.only == "prepare":
        return 0
    wanted = {(name, count, draw) for name in names for count in shots for draw in range(draws)}
    cells = [c for c in read() if (c["task"], c["shots"], c["draw"]) in wanted]
    if not cells:
        say("no cell has ended yet")
        return 1
    found = report(cells)
    text = markdown(found, len(cells), len(wanted))
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    if options.priors:
        by_kind = {k: {n: asdict(p) for n, p in priors(cells, k).items()} for k in sorted({c["kind"] for c in cells})}
        both = together(cells)
        joint = {"names": both.names, "correlation": both.correlation.round(4).tolist()}
        joint |= {"seconds": both.seconds.round(4).tolist()}
        tasks = sorted({c["task"] for c in cells})
        about = {"cells": len(cells), "tasks": tasks, "together": joint, "priors": by_kind}
        options.priors.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if options.json:
        from metapeft.runtime import describe

        command = " ".join(["python", "benchmarks/fewshot.py", *sys.argv[1:]])
        record = {"machine": describe(), "command": command, "cells": len(cells), "of": len(wanted), **found}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def place(library: Sequence[str], rounds: int, records: Path | None) -> None:
    """Where what was learned beforehand is, and the finished cells that met it."""
    learned = json.dumps([sorted(library), rounds, DATA.model_dump()])
    _place.append(home() / "benchmarks" / "fewshot" / hashlib.sha256(learned.encode()).hexdigest()[:8])
    _records.append(records or folder() / "cells.jsonl")


_place: list[Path] = []
_records: list[Path] = []
_loaded: dict[str, Any] = {}


def backbone() -> Any:
    from metapeft import backbones

    if BACKBONE not in _loaded:
        _loaded[BACKBONE] = backbones.load(BACKBONE)
    return _loaded[BACKBONE]


def task(name: str) -> Any:
    from metapeft.data import load_task

    if name not in _loaded:
        _loaded[name] = load_task(name, DATA)
    return _loaded[name]


def opened(of: Any) -> Any:
    """A session on the benchmark's backbone."""
    from metapeft.training.session import Session

    _loaded["session"] = Session(backbone(), of, _loaded.get("session"))
    return _loaded["session"]


def cold() -> dict[str, dict[str, Any]]:
    from metapeft.backbones.forward import anatomy
    from metapeft.fewshot import strategies

    return strategies.cold(anatomy(backbone().model).depth)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def folder() -> Path:
    """One per library and rounds: cells that met different ones are not put together."""
    return _place[-1]


# What is learned before a task is met


def prepare(names: Sequence[str], rounds: int, until: float) -> None:
    """The library, and the meta-learned starts for both halves."""
    for method, configuration in cold().items():
        for knowledge in (True, False):
            learned_from = [name for name in names if (task(name).family in HALF) == knowledge]
            if time.monotonic() < until and learned_from:
                learn_start(learned_from, method, configuration, knowledge, rounds, until)
        for name in names:
            if time.monotonic() < until:
                teach(name, method, configuration)


def teach(name: str, method: str, configuration: dict[str, Any]) -> None:
    """One adapter for the library, trained as `metapeft train` would."""
    from metapeft.meta import library
    from metapeft.profiling import profile
    from metapeft.training.trainer import run_trial

    if (task(name).version, method) in {(e.trial.task_version, e.trial.method) for e in library.entries()}:
        return
    begin = time.monotonic()
    session = opened(task(name))
    place = folder() / f"teaching-{os.getpid()}"  # others may prepare at the same time
    trial = run_trial(session, configuration, steps=STEPS, folder=place, test=False)
    library.offer(place, trial, task(name), profile(task(name), backbone()))
    shutil.rmtree(place, ignore_errors=True)
    reached = trial.validation.value if trial.validation else math.nan
    say(f"library: {name} {method} {trial.status} {reached:.3f} in {time.monotonic() - begin:.0f} s")


def start_folder(method: str, knowledge: bool) -> Path:
    half = "knowledge" if knowledge else "others"
    return folder() / "starts" / f"{method}-from-{half}"


def learn_start(
    names: Sequence[str], method: str, configuration: dict[str, Any], knowledge: bool, rounds: int, until: float
) -> None:
    from metapeft.fewshot import reptile

    place = start_folder(method, knowledge)
    begin = time.monotonic()

    def told(number: int, loss: float) -> bool:
        if number % 20 == 0:
            say(f"start: {place.name} round {number} of {rounds}, loss {loss:.2f}, {time.monotonic() - begin:.0f} s")
        return time.monotonic() > until

    reptile.reptile(backbone(), [task(n) for n in names], configuration, rounds=rounds, folder=place, report=told)


# One cell: a task, a number of shots, a draw


def read() -> list[dict[str, Any]]:
    """Every finished cell once, of those that met this library and these starts."""
    path = _records[-1]
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if line.endswith("}"):  # the last one may have been cut
            record = json.loads(line)
            if record.get("learned", folder().name) != folder().name:
                continue
            found[record["task"], record["shots"], record["draw"]] = record
    return list(found.values())


def cell(name: str, count: int, draw: int, learned_from: Sequence[str], fill: bool = False) -> None:
    """All strategies on one draw of shots; appends what was found. fill: only those that a finished cell lacks."""
    from metapeft.fewshot.adapt import NEIGHBOURS
    from metapeft.fewshot.measure import answers
    from metapeft.fewshot.strategies import strategies
    from metapeft.meta import library
    from metapeft.profiling import profile

    known = next((c for c in read() if (c["task"], c["shots"], c["draw"]) == (name, count, draw)), None)
    if (known is not None) != fill or count > len(task(name).train):
        return
    begin = time.monotonic()
    few, session = met(name, count, draw)
    family = task(name).family
    versions = {task(n).version for n in learned_from}
    near = library.find(profile(few, backbone()), 10**6, without={name, family})
    near = [found for found in near if found.entry.trial.task_version in versions]
    nearest = list(dict.fromkeys(found.entry.trial.task for found in near))[:NEIGHBOURS]
    near = [found for found in near if found.entry.trial.task in nearest]
    ways = strategies(session, near, meta_learned(family))
    folds = choose.sessions(backbone(), few, choose.fold_count(count), session)
    record: dict[str, Any] = {"task": name, "family": family, "kind": few.kind, "shots": count, "draw": draw}
    record["learned"] = folder().name
    if known is not None:
        record = known
        missing = [way for way in ways if way.name not in record["strategies"]]
        if not missing:
            return
        known_shots, begun_with = unpacked(record["untuned"]["shots"]), held_out(record)
        if "tried" in record:
            held = cross_validated(ways, folds, known_shots, few, begun_with)
            record["tried"] = list(held)
        else:
            held = {way.name: choose.cross_validate(way, folds) for way in missing}
    else:
        record["near"] = [[f.entry.trial.task, f.entry.trial.method, round(f.similarity, 3)] for f in near]
        record["untuned"] = {"shots": packed(answers(session, None, "train")), "test": zero(name)}
        record["rivals"] = {RIVAL: tested(Strategy(RIVAL, RIVAL_CONFIGURATION), session, count)}
        record["strategies"] = {}
        missing, held = ways, cross_validated(ways, folds, unpacked(record["untuned"]["shots"]), few, {})
        record["tried"] = list(held)
    for way in missing:
        record["strategies"][way.name] = noted(held.get(way.name)) | tested(way, session, count)
    record["seconds"] = round(record.get("seconds", 0.0) + time.monotonic() - begin, 1)
    append(_records[-1], record)
    scores = {n: f"{hits(s['test'][max(s['test'], key=int)]).mean():.2f}" for n, s in record["strategies"].items()}
    say(f"{name} {count} shots, draw {draw}: untuned {hits(record['untuned']['test']).mean():.2f} {scores}")
    say(f"  {record['seconds']:.0f} s")


def append(path: Path, record: dict[str, Any]) -> None:
    """One more line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # a kill cut the last line
        file.write(json.dumps(record).encode() + b"\n")


def met(name: str, count: int, draw: int) -> tuple[Any, Any]:
    """The task with these shots alone, and a session on it."""
    from metapeft.data import shots

    few = shots.draw(task(name), count, draw)
    return few, opened(replace(few, validation=few.train[:1]))


def meta_learned(family: str) -> dict[str, Any]:
    """The starts, by method, that were learned from the half of the tasks that this family is not in."""
    from metapeft.fewshot import reptile
    from metapeft.fewshot.strategies import METHODS

    found = {method: reptile.read(start_folder(method, family not in HALF)) for method in METHODS}
    return {method: each.saved for method, each in found.items() if each is not None}


def noted(held: Held | None) -> dict[str, Any]:
    """Of a strategy that was not tried: nothing."""
    if held is None:
        return {}
    found = {str(step): packed(each) for step, each in held.answers.items()}
    return {"held": found, "held_seconds": round(held.seconds, 2)}


def cross_validated(
    ways: Sequence[Strategy], folds: Any, untuned: Answers, few: Any, before: Mapping[str, Held]
) -> dict[str, Held]:
    """Answers to held-out shots of the strategies that `adapt` would try, in its order, by what cells of other families
    say until now. before: of those that were tried."""
    others = [c for c in read() if c["family"] != few.family]
    beliefs, both = priors(others, few.kind), together(others)
    held = dict(before)
    while (way := worth.following(ways, held, untuned, beliefs, both)) is not None:
        held[way.name] = choose.cross_validate(way, folds)
    return held


def tested(way: Strategy, session: Any, count: int) -> dict[str, Any]:
    """Hits on the test split of a strategy that is trained on all shots, by steps; seconds of training until there."""
    from metapeft.fewshot.measure import answers

    seconds: dict[int, float] = {}
    spent, begin = 0.0, time.perf_counter()

    def measure(at: Any, adapter: Any) -> Answers:
        nonlocal spent
        now = time.perf_counter()
        found = answers(at, adapter, "test")
        seconds[len(seconds)] = now - begin - spent
        spent += time.perf_counter() - now
        return found

    found = choose.fitted(way, session, range(count), AT, measure)
    return {
        "test": {str(step): bits(each.hit) for step, each in found.items()},
        "seconds": {str(step): round(seconds[i], 2) for i, step in enumerate(found) if i in seconds},
    }


def zero(name: str) -> str:
    """The untuned backbone's hits on the test split, measured once per task."""
    from metapeft.fewshot.measure import answers

    key = f"zero {name}"
    if key not in _loaded:
        known = [c["untuned"]["test"] for c in read() if c["task"] == name]
        session = opened(task(name)) if not known else None
        _loaded[key] = known[0] if known else bits(answers(session, None, "test").hit)
    return _loaded[key]


def packed(found: Answers) -> dict[str, Any]:
    return {
        "hit": bits(found.hit),
        "right": np.round(found.right, 4).tolist(),
        "loss": np.round(found.loss, 3).tolist(),
    }


def bits(values: Iterable[float]) -> str:
    return "".join(str(int(v)) for v in values)


def hits(text: str) -> np.ndarray:
    return np.array([float(c) for c in text])


def unpacked(record: dict[str, Any]) -> Answers:
    return Answers(hits(record["hit"]), np.array(record["right"]), np.array(record["loss"]))


# What the cells say


def report(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows (per strategy and number of shots), per-task rows and targets."""
    for c in cells:
        others = [o for o in cells if o["family"] != c["family"]]
        c["were_tried"] = tried(c, others)
        choice, too_good = automatic(c, others, c["were_tried"])
        judged = choice.chosen
        c["judged"], c["optimism"] = judged, too_good
        c["choice"] = "zero-shot" if judged is None else judged.strategy
        c["choice_steps"] = 0 if judged is None else judged.steps
        c["avoided"] = [j.strategy for j in choice.judged if j.transfer and j.transfer.avoided]
        c["scores"] = scores(c, others)
        if "tried" not in c:  # everything was
            c["all_tried"] = float(score_of(c, automatic(c, others, list(held_out(c)))[0]).mean())
    names = list(dict.fromkeys(name for c in cells for name in c["scores"]))
    counts = sorted({c["shots"] for c in cells})
    rows = []
    for name in names:
        for count in [*counts, 0]:
            values = [(c["task"], c["scores"][name]) for c in cells if name in c["scores"] and count in (0, c["shots"])]
            if values:
                mean, error = clustered(values)
                rows.append(
                    {
                        "strategy": name,
                        "shots": count or "all",
                        "score": mean,
                        "standard_error": error,
                        "cells": len(values),
                    }
                )
    return {
        "rows": rows,
        "gains": by_kind(cells, names),
        "tasks": by_task(cells),
        "chosen": chosen_counts(cells),
        "speed": speed(cells),
        "sure": sure(cells),
        "trying": trying(cells),
        "targets": targets(cells, names),
    }


def trained(c: dict[str, Any], name: str) -> dict[str, Any]:
    return c["rivals"][name] if name in c["rivals"] else c["strategies"][name]


def stronger(cells: Iterable[dict[str, Any]]) -> str:
    """Of both cold LoRAs the one that is better on average."""
    every = list(cells)
    return max((RIVAL, "cold lora"), key=lambda name: np.mean([final(c, name).mean() for c in every]))


def final(c: dict[str, Any], name: str) -> np.ndarray:
    test = trained(c, name)["test"]
    return hits(test[max(test, key=int)])


def scores(c: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, float]:
    """Test scores after the whole schedule; of the automatic choice after as many steps as it chose."""
    found = {"zero-shot": float(hits(c["untuned"]["test"]).mean())}
    found |= {name: float(final(c, name).mean()) for name in (*c["strategies"], *c["rivals"])}
    colds = [name for name in c["strategies"] if name.startswith("cold")]
    usual = {n: np.mean([final(o, n).mean() for o in others if n in o["strategies"]] or [0.0]) for n in colds}
    found["cold best method"] = found[max(colds, key=lambda n: usual[n])]
    found["adapt"] = float(adapted(c).mean())
    return found


def adapted(c: dict[str, Any]) -> np.ndarray:
    if c["choice"] == "zero-shot":
        return hits(c["untuned"]["test"])
    return hits(c["strategies"][c["choice"]]["test"][str(c["choice_steps"])])


def score_of(c: dict[str, Any], choice: choose.Choice) -> np.ndarray:
    """Hits on the test split of what was chosen."""
    if choice.chosen is None:
        return hits(c["untuned"]["test"])
    return hits(c["strategies"][choice.chosen.strategy]["test"][str(choice.chosen.steps)])


def held_out(c: dict[str, Any]) -> dict[str, Held]:
    """Answers to held-out shots, of the strategies that were cross-validated in this cell."""
    return {
        name: Held({int(step): unpacked(found) for step, found in record["held"].items()}, record["held_seconds"])
        for name, record in c["strategies"].items()
        if "held" in record
    }


def ways_of(c: dict[str, Any]) -> list[Strategy]:
    names = list(c["strategies"])
    return [Strategy(name, None if name == "context" else {}, rival=rival(name, names)) for name in names]


def tried(c: dict[str, Any], others: list[dict[str, Any]]) -> list[str]:
    """What `metapeft adapt` tries: as it was in the cell, or, where everything was tried, as it would be now."""
    if "tried" in c:
        return list(c["tried"])
    every, held = held_out(c), {}
    untuned, beliefs, both = unpacked(c["untuned"]["shots"]), priors(others, c["kind"]), together(others)
    while (way := worth.following(ways_of(c), held, untuned, beliefs, both)) is not None:
        held[way.name] = every[way.name]
    return list(held)


def automatic(c: dict[str, Any], others: list[dict[str, Any]], names: Collection[str]) -> tuple[choose.Choice, float]:
    """What `metapeft adapt` chooses when it tried these, with priors of the cells of other families, and what it takes
    off its held-out score."""
    held = {name: each for name, each in held_out(c).items() if name in names}
    ways = [way for way in ways_of(c) if way.name in held]
    untuned, beliefs = unpacked(c["untuned"]["shots"]), priors(others, c["kind"])
    too_good = optimism(ways, held, untuned, beliefs)
    return choose.choose(ways, held, untuned, beliefs, too_good.gain), too_good.score


def rival(name: str, names: Collection[str]) -> str:
    cold_one = f"cold {name.split()[-1]}"
    return cold_one if name.split()[0] in ("nearest", "mix", "reptile") and cold_one in names else ""


def gained(c: dict[str, Any]) -> dict[str, float]:
    """What each strategy gained on the test split, at the step that its held-out shots favour; where it was not
    cross-validated, at the last."""
    if "gained" not in c:
        before, held = hits(c["untuned"]["test"]).mean(), held_out(c)
        steps = {n: held[n].best() if n in held else max(map(int, r["test"])) for n, r in c["strategies"].items()}
        c["gained"] = {n: float(hits(r["test"][str(steps[n])]).mean() - before) for n, r in c["strategies"].items()}
    found: dict[str, float] = c["gained"]
    return found


def together(cells: list[dict[str, Any]]) -> Together:
    """How the strategies' gains go together, over cells of one kind at a time, drawn towards none; and what trying each
    costs, where all were tried."""
    names = list(dict.fromkeys(name for c in cells for name in c["strategies"]))
    apart = []
    for kind in sorted({c["kind"] for c in cells}):
        rows = np.array([[gained(c).get(name, math.nan) for name in names] for c in cells if c["kind"] == kind])
        if len(rows) >= LEAST:
            known = np.ma.masked_invalid(rows)
            apart.append((known - known.mean(axis=0)).filled(0.0))
    correlation = np.eye(len(names))
    if apart:
        table = np.concatenate(apart)
        table = table / np.maximum(1e-9, np.sqrt((table**2).mean(axis=0)))
        correlation = (1 - TOWARDS_NONE) * table.T @ table / len(table)
        np.fill_diagonal(correlation, 1.0)
    shares = [{n: h.seconds for n, h in held_out(c).items()} for c in cells if "tried" not in c]
    seconds = [np.mean([s[n] / sum(s.values()) for s in shares if n in s] or [1 / len(names)]) for n in names]
    return Together(tuple(names), correlation, np.array(seconds))


def priors(cells: list[dict[str, Any]], kind: str) -> dict[str, Prior]:
    """What each strategy gained in the cells of this kind (where these are too few: in all). The mean of few cells is
    unsure itself: that is part of the deviation."""
    gains: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for c in cells:
        for name, gain in gained(c).items():
            gains[name].append((c["kind"] == kind, gain))
    found = {}
    for name, every in gains.items():
        of_kind = [gain for same, gain in every if same]
        values = of_kind if len(of_kind) >= LEAST else [gain for _, gain in every]
        if len(values) >= LEAST:
            deviation = max(LEAST_DEVIATION, float(np.std(values, ddof=1))) * math.sqrt(1 + 1 / len(values))
            found[name] = Prior(float(np.mean(values)), deviation)
    return found


def clustered(values: list[tuple[str, float]]) -> tuple[float, float]:
    """Mean over tasks of their means, and its standard error over tasks (cells of a task are not independent)."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in values:
        groups[name].append(value)
    means = [float(np.mean(found)) for found in groups.values()]
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def by_kind(cells: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """What each strategy gains over the untuned backbone, per kind of task and number of shots (0: all)."""
    rows = []
    for kind in sorted({c["kind"] for c in cells}):
        for count in [*sorted({c["shots"] for c in cells}), 0]:
            mine = [c for c in cells if c["kind"] == kind and count in (0, c["shots"])]
            for name in names:
                values = [
                    (c["task"], c["scores"][name] - c["scores"]["zero-shot"]) for c in mine if name in c["scores"]
                ]
                if values and name != "zero-shot":
                    gain = clustered(values)[0]
                    rows.append({"kind": kind, "shots": count or "all", "strategy": name, "gain": gain})
    return rows


def by_task(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The automatic choice beside the untuned backbone, on each task."""
    rows = []
    for name in dict.fromkeys(c["task"] for c in cells):
        mine = [c for c in cells if c["task"] == name]
        differences = np.array([adapted(c) - hits(c["untuned"]["test"]) for c in mine])  # (cells, test rows)
        per_row = differences.mean(axis=0)
        error = math.sqrt(
            per_row.var(ddof=1) / len(per_row)
            + (differences.mean(axis=1).var(ddof=1) / len(mine) if len(mine) > 1 else 0.0)
        )
        row = {"task": name, "cells": len(mine), "untuned": float(hits(mine[0]["untuned"]["test"]).mean())}
        row |= {n: float(np.mean([c["scores"][n] for c in mine])) for n in ("context", RIVAL, "cold prefix", "adapt")}
        row |= {"difference": float(per_row.mean()), "standard_error": error}
        rows.append(row)
    return rows


def chosen_counts(cells: list[dict[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for c in cells:
        found[c["choice"]] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def trying(cells: list[dict[str, Any]]) -> dict[str, float]:
    """How much of the strategies, and of the seconds that trying all of them takes, `adapt` tries; over the cells where
    all were tried."""
    counts, shares, spent, whole = [], [], 0.0, 0.0
    for c in cells:
        if "tried" not in c:
            seconds = {name: each.seconds for name, each in held_out(c).items()}
            mine = sum(seconds[name] for name in c["were_tried"])
            counts.append(len(c["were_tried"]) / len(seconds))
            shares.append(mine / sum(seconds.values()))
            spent, whole = spent + mine, whole + sum(seconds.values())
    both = [(c["task"], c["scores"]["adapt"] - c["all_tried"]) for c in cells if "tried" not in c]
    less, error = clustered(both) if both else (math.nan, math.nan)
    return {
        "cells": len(counts),
        "strategies": float(np.mean(counts or [math.nan])),
        "seconds": spent / whole if whole else math.nan,
        "median_seconds": float(np.median(shares or [math.nan])),
        "score_less_all_tried": less,
        "standard_error": error,
    }


def sure(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether what `adapt` says of its choice holds on the test split: its score on held-out shots, the gain it expects
    (its interval widened by what 100 test rows leave open), and how sure it is that it gains: in truth, and on so few
    rows, which is what they can show."""
    tuned = [c for c in cells if c["judged"] is not None]
    looked, corrected, gains, held_90, bins = [], [], [], [], defaultdict(list)
    by_shots: dict[int, list[float]] = defaultdict(list)
    for c in tuned:
        judged: choose.Judged = c["judged"]
        held = hits(c["strategies"][judged.strategy]["held"][str(judged.steps)]["hit"]).mean()
        reached, before = float(adapted(c).mean()), c["scores"]["zero-shot"]
        looked.append((c["task"], float(held) - reached))
        corrected.append((c["task"], max(0.0, float(held) - c["optimism"]) - reached))
        by_shots[c["shots"]].append(corrected[-1][1])
        gains.append((c["task"], judged.gain - (reached - before)))
        rows = adapted(c) - hits(c["untuned"]["test"])
        open_yet = math.hypot(judged.deviation, float(rows.std(ddof=1)) / math.sqrt(len(rows)))
        held_90.append(abs(gains[-1][1]) <= 1.645 * open_yet)
        level = next(level for level in SURE if judged.p_better >= level)
        shows = choose.chance(judged.gain, open_yet)
        bins[level].append((judged.p_better, shows, reached > before))
    return {
        "cells": len(tuned),
        "held_out_too_good": clustered(looked),
        "held_out_too_good_corrected": clustered(corrected),
        "by_shots": {k: float(np.mean(v)) for k, v in sorted(by_shots.items())},
        "gain_too_good": clustered(gains),
        "gain_90_coverage": float(np.mean(held_90)),
        "gains": [
            {
                "from": level,
                "cells": len(found),
                "said": float(np.mean(found, axis=0)[0]),
                "shows": float(np.mean(found, axis=0)[1]),
                "did": float(np.mean(found, axis=0)[2]),
            }
            for level, found in sorted(bins.items())
        ],
    }


def speed(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps and seconds until the automatic choice's test score is the stronger cold LoRA's final one, over those that
    this LoRA itself takes until it first has it (and the share of cells where the choice gets there). Looks are apart,
    so LoRA is given the fewest steps that it can have taken: one more than at its last look without that score, and the
    choice the most. Cells where the untuned backbone is there already tell nothing."""
    steps, scheduled, seconds, from_context, closer = [], [], [], 0, 0
    by_task: dict[str, list[float]] = defaultdict(list)
    goal_name = stronger(cells)
    looks = closer_looks()
    for c in cells:
        goal = c["scores"][goal_name]
        if c["scores"]["zero-shot"] >= goal:
            continue
        lora, mine = approach(c, goal_name, goal), approach(c, c["choice"], goal)
        if unsettled(lora, mine):
            both = [looks.get((c["task"], c["shots"], c["draw"], name, goal)) for name in (goal_name, c["choice"])]
            if both[0] is not None and both[1] is not None and math.isfinite(both[0].step):
                lora, mine, closer = both[0], both[1], closer + 1
        steps.append(mine.step / (1 + lora.before))
        scheduled.append(mine.step / max(AT))
        by_task[c["task"]].append(steps[-1])
        from_context += steps[-1] == 0 and c["choice"] in ("context", "tuned context")
        seconds.append(mine.seconds / max(1e-9, lora.seconds))
    return {
        "cells": len(steps),
        "reached": float(np.mean(np.isfinite(steps))) if steps else math.nan,
        "untrained": int(np.sum(np.array(steps) == 0)),
        "of_these_from_context": from_context,
        "looked_at_closer": closer,
        "a_third": float(np.mean(np.array(steps) <= 1 / 3)) if steps else math.nan,
        "a_third_over_other_tasks": elsewhere(list(by_task.values())),
        "median_steps_ratio": float(np.median(steps)) if steps else math.nan,
        "median_of_the_schedule": float(np.median(scheduled)) if steps else math.nan,
        "median_seconds_ratio": float(np.median(seconds)) if seconds else math.nan,
    }


@dataclass(frozen=True)
class Approach:
    """Towards a test score: the first look with it (infinity: none), the last look before, training until then."""

    step: float
    before: int
    seconds: float


def unsettled(lora: Approach, mine: Approach) -> bool:
    """Whether the ratio of their steps depends on where the looks fall."""
    return mine.step > 0 and lora.step > 0


def closer_looks() -> dict[tuple[str, int, int, str, float], Approach]:
    """What benchmarks/fewshot_looks.py found, by task, shots, draw, strategy and the score that was to be reached."""
    found = {}
    path = looks_path()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if line.endswith("}"):  # the last one may have been cut
            r = json.loads(line)
            if r["learned"] == folder().name:
                step = math.inf if r["step"] is None else r["step"]
                found[r["task"], r["shots"], r["draw"], r["strategy"], r["goal"]] = Approach(
                    step, r["before"], math.inf if r["step"] is None else r["seconds"]
                )
    return found


def looks_path() -> Path:
    """Beside the cells."""
    return _records[-1].with_name(_records[-1].stem + "_looks.jsonl")


def elsewhere(ratios: list[list[float]], draws: int = 2000) -> float:
    """How often the median would be a third or less over as many tasks drawn from these (bootstrap; seeded)."""
    random = np.random.default_rng(0)
    drawn = (random.integers(0, len(ratios), len(ratios)) for _ in range(draws if ratios else 0))
    return float(np.mean([np.median(np.concatenate([ratios[i] for i in each])) <= 1 / 3 for each in drawn] or [0.0]))


def begun(c: dict[str, Any], name: str) -> dict[str, Any]:
    """A strategy's record with the score of its start: of a context that is trained further that is the context itself,
    a strategy of its own."""
    record = c["strategies"][name]
    if name != "tuned context":
        return record
    context = c["strategies"]["context"]
    return {key: {**context[key], **record[key]} for key in ("test", "seconds")}


def approach(c: dict[str, Any], name: str, goal: float) -> Approach:
    """By the looks of the cell itself."""
    if name == "zero-shot":
        return Approach(math.inf, 0, math.inf)
    record = trained(c, name) if name in c["rivals"] else begun(c, name)
    before = 0
    for step in sorted(record["test"], key=int):
        if hits(record["test"][step]).mean() >= goal:
            return Approach(int(step), before, record["seconds"].get(step, 0.0))
        before = int(step)
    return Approach(math.inf, before, math.inf)


def targets(cells: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    singles = [n for n in names if n not in ("adapt", "cold best method", RIVAL)]
    everywhere = [n for n in singles if all(n in c["scores"] for c in cells)]
    best = max(everywhere, key=lambda n: clustered([(c["task"], c["scores"][n]) for c in cells])[0])
    ahead, error = clustered([(c["task"], c["scores"]["adapt"] - c["scores"][best]) for c in cells])
    few = [c for c in cells if c["shots"] <= FEW]
    lora = stronger(few or cells)
    over, _ = clustered([(c["task"], c["scores"]["adapt"] - c["scores"][lora]) for c in few] or [("", math.nan)])
    worse = [r["task"] for r in by_task(cells) if r["difference"] < -2 * r["standard_error"]]
    ratio = speed(cells)["median_steps_ratio"]
    slack = 0.0 if math.isnan(error) else error
    rows = [
        (f"adapt less the best single strategy ({best}), or within {slack:.3f} of it", ahead, 0.0, ahead >= -slack),
        (f"adapt less the stronger cold LoRA ({lora}) at {FEW} shots or fewer", over, 0.05, over >= 0.05),
        (
            "steps to the stronger cold LoRA's final score, over the fewest it can take itself (median)",
            ratio,
            1 / 3,
            ratio <= 1 / 3,
        ),
        (f"tasks significantly worse than the untuned backbone {' '.join(worse)}".strip(), len(worse), 0, not worse),
    ]
    return [{"name": name, "value": value, "target": goal, "met": bool(met)} for name, value, goal, met in rows]


def markdown(found: dict[str, Any], done: int, wanted: int) -> str:
    counts = list(dict.fromkeys(r["shots"] for r in found["rows"]))
    names = list(dict.fromkeys(r["strategy"] for r in found["rows"]))
    table = {(r["strategy"], r["shots"]): r for r in found["rows"]}
    lines = [f"{done} of {wanted} cells; ± is one standard error over tasks.", ""]
    lines += ["| strategy | " + " | ".join(f"{c} shots" if c != "all" else "all" for c in counts) + " |"]
    lines += ["|---" * (len(counts) + 1) + "|"]
    for name in names:
        cells = [table.get((name, c)) for c in counts]
        lines.append(
            f"| {name} | "
            + " | ".join(f"{r['score']:.3f} ± {r['standard_error']:.3f}" if r else "" for r in cells)
            + " |"
        )
    places = list(dict.fromkeys((r["kind"], r["shots"]) for r in found["gains"]))
    gains = {(r["strategy"], r["kind"], r["shots"]): f"{r['gain']:+.3f}" for r in found["gains"]}
    lines += ["", "Gain over the untuned backbone by kind of task.", ""]
    lines += ["| strategy | " + " | ".join(f"{kind}, {count}" for kind, count in places) + " |"]
    lines += ["|---" * (len(places) + 1) + "|"]
    for name in names[1:]:
        lines.append(f"| {name} | " + " | ".join(gains.get((name, *place), "") for place in places) + " |")
    lines += [
        "",
        f"| task | cells | untuned | context | {RIVAL} | cold prefix | adapt | adapt less untuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found["tasks"]:
        numbers = " | ".join(f"{r[n]:.3f}" for n in ("untuned", "context", RIVAL, "cold prefix", "adapt"))
        lines.append(f"| {r['task']} | {r['cells']} | {numbers} | {r['difference']:+.3f} ± {r['standard_error']:.3f} |")
    swift = found["speed"]
    lines += [
        "",
        f"LoRA's final score: {swift['cells']} cells, in {swift['untrained']} before the first step"
        f" ({swift['of_these_from_context']} from the context), reached in {swift['reached']:.0%}, in a third of LoRA's"
        f" steps or less in {swift['a_third']:.0%} ({swift['looked_at_closer']} cells looked at closer); median of a"
        f" third or less over other tasks: {swift['a_third_over_other_tasks']:.0%}. Steps over those of LoRA's whole"
        f" training, median: {swift['median_of_the_schedule']:.3f}.",
    ]
    swift = found["trying"]
    lines += [
        "",
        f"Trying ({swift['cells']} cells where everything was tried): adapt tries {swift['strategies']:.0%} of the"
        f" strategies, in {swift['seconds']:.0%} of the seconds (median {swift['median_seconds']:.0%}); its score less"
        f" that of trying all: {swift['score_less_all_tried']:+.4f} ± {swift['standard_error']:.4f}.",
    ]
    said = found["sure"]
    by_shots = ", ".join(f"{k}: {v:+.3f}" for k, v in said["by_shots"].items())
    lines += [
        "",
        f"What adapt says of its choice, on the test split ({said['cells']} cells): held-out score too good by"
        f" {said['held_out_too_good'][0]:.3f} ± {said['held_out_too_good'][1]:.3f}, corrected by"
        f" {said['held_out_too_good_corrected'][0]:+.3f} ± {said['held_out_too_good_corrected'][1]:.3f}"
        f" (by shots: {by_shots}); expected gain"
        f" too good by {said['gain_too_good'][0]:+.3f} ± {said['gain_too_good'][1]:.3f}, its 90 % interval holds"
        f" {said['gain_90_coverage']:.2f}.",
        "",
        "| sure that it gains | cells | said, on average | so, on as few test rows | gained there |",
        "|---|---|---|---|---|",
        *[
            f"| from {r['from']} | {r['cells']} | {r['said']:.3f} | {r['shows']:.3f} | {r['did']:.3f} |"
            for r in said["gains"]
        ],
    ]
    lines += ["", "Chosen: " + ", ".join(f"{name} {count}" for name, count in found["chosen"].items()) + ".", ""]
    lines += ["| target | value | wanted | met |", "|---|---|---|---|"]
    lines += [
        f"| {t['name']} | {t['value']:.3f} | {t['target']:.3f} | {'yes' if t['met'] else 'no'} |"
        for t in found["targets"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
