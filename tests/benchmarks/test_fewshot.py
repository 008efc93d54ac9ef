"""The report of the few-shot benchmark: nothing that is chosen for a cell knows a cell of its family."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "fewshot.py"
NAMES = ("context", "tuned context", "cold lora", "cold prefix", "reptile lora")
ROWS = 40


@pytest.fixture(scope="module")
def fewshot() -> Any:
    spec = importlib.util.spec_from_file_location("fewshot_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def bits(random: np.random.Generator, share: float, count: int) -> str:
    return "".join(str(int(x)) for x in random.random(count) < share)


def answered(random: np.random.Generator, share: float, shots: int) -> dict[str, Any]:
    hit = bits(random, share, shots)
    right = [0.8 if h == "1" else 0.2 for h in hit]
    return {"hit": hit, "right": right, "loss": [-float(np.log(r)) for r in right]}


def cells(fewshot: Any, families: int = 4, draws: int = 3, shots: int = 8) -> list[dict[str, Any]]:
    """Of two tasks a family, where everything was tried."""
    random = np.random.default_rng(0)
    made = []
    for family in range(families):
        for task in range(2):
            worth = {name: random.uniform(0.2, 0.9) for name in NAMES}
            for draw in range(draws):
                about = {"task": f"t{family}{task}", "family": f"f{family}", "kind": "generation", "shots": shots}
                strategies = {
                    name: {
                        "held": {
                            s: answered(random, worth[name], shots)
                            for s in (["0"] if name == "context" else ["10", "40"])
                        },
                        "held_seconds": 1.0 if name == "context" else 5.0,
                        "test": {
                            s: bits(random, worth[name], ROWS) for s in (["0"] if name == "context" else ["10", "40"])
                        },
                        "seconds": {"0": 0.1} if name == "context" else {"10": 1.0, "40": 4.0},
                    }
                    for name in NAMES
                }
                untuned = {"shots": answered(random, 0.1, shots), "test": bits(random, 0.1, ROWS)}
                rivals = {fewshot.RIVAL: {"test": {"40": bits(random, 0.4, ROWS)}, "seconds": {"40": 4.0}}}
                made.append(about | {"draw": draw, "untuned": untuned, "rivals": rivals, "strategies": strategies})
    return made


def chosen(fewshot: Any, every: list[dict[str, Any]], at: int) -> tuple[Any, ...]:
    c = every[at]
    others = [o for o in every if o["family"] != c["family"]]
    names = fewshot.tried(c, others)
    choice, too_good = fewshot.automatic(c, others, names)
    return names, choice.chosen and (choice.chosen.strategy, choice.chosen.steps), too_good


def test_what_is_tried_and_chosen_knows_no_cell_of_its_family_and_no_test_row(fewshot: Any, tmp_path: Path) -> None:
    fewshot._place.append(tmp_path)
    fewshot._records.append(tmp_path / "cells.jsonl")
    every = cells(fewshot)
    found = fewshot.report(copy.deepcopy(every))
    assert {row["strategy"] for row in found["rows"]} >= {*NAMES, "adapt"} and found["trying"]["cells"] == len(every)
    for at in (0, 5, 20):
        before = chosen(fewshot, copy.deepcopy(every), at)
        changed = copy.deepcopy(every)
        for c in changed:
            if c["family"] == changed[at]["family"]:
                for record in c["strategies"].values():
                    record["test"] = {step: "1" * ROWS for step in record["test"]}
        assert chosen(fewshot, changed, at) == before
        assert set(before[0]) <= set(NAMES) and len(before[0]) >= 1


def test_what_was_tried_in_the_cell_counts_and_nothing_else(fewshot: Any) -> None:
    every = cells(fewshot)
    c = every[3]
    c["tried"] = ["context", "cold lora"]
    for name in ("tuned context", "reptile lora"):
        del c["strategies"][name]["held"], c["strategies"][name]["held_seconds"]
    others = [o for o in every if o["family"] != c["family"]]
    assert fewshot.tried(c, others) == c["tried"]
    choice, _ = fewshot.automatic(c, others, c["tried"])
    assert {j.strategy for j in choice.judged} == set(c["tried"])
    assert fewshot.gained(c)["tuned context"] == pytest.approx(
        fewshot.hits(c["strategies"]["tuned context"]["test"]["40"]).mean() - fewshot.hits(c["untuned"]["test"]).mean()
    )


def test_gains_that_go_together_are_seen(fewshot: Any) -> None:
    every = cells(fewshot, families=6, draws=4)
    for c in every:
        c["strategies"]["tuned context"]["test"] = {s: c["strategies"]["context"]["test"]["0"] for s in ("10", "40")}
    both = fewshot.together(every)
    place = {name: i for i, name in enumerate(both.names)}
    assert both.correlation[place["context"], place["tuned context"]] == pytest.approx(1 - fewshot.TOWARDS_NONE)
    assert np.linalg.eigvalsh(both.correlation).min() > 0
    assert both.seconds.sum() == pytest.approx(1) and both.seconds[place["context"]] == both.seconds.min()
