from __future__ import annotations

import shlex
from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from metapeft.report import tables, wording
from metapeft.search import pareto
from tests.report.examples import recommendation, trials


def printed(table: Table, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue().replace("\u202f", " ")  # type: ignore[attr-defined, no-any-return]


def test_every_table_fits_eighty_columns() -> None:
    done = trials()
    rows = pareto.explain(done)
    for table in (tables.recommendation(recommendation(), "Recommended"), tables.front(rows), tables.trials(done)):
        text = printed(table)
        assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_recommendation() -> None:
    text = printed(tables.recommendation(recommendation()))
    lines = [line for line in text.splitlines() if "●" in line]
    assert [line.split()[1] for line in lines] == ["LoRA", "P-tuning", "prefix", "prompt"]
    assert "90.0 %" in lines[0] and "50 %" in lines[0] and "30 s" in lines[0] and "1.5 MB" in lines[0]
    assert "90 % interval" in text and "< 1 %" in lines[3]
    places = [line.index("●") for line in lines]
    assert places == sorted(places, reverse=True), "a lower expected score is farther left"
    assert "1  learning rate 0.001" in text


def test_recommendation_without_scores() -> None:
    found = recommendation()
    for entry in found["recommendations"]:
        entry |= {"score": None, "p_best": None, "seconds": None}
    assert "–" in printed(tables.recommendation(found))


def test_front_and_commands() -> None:
    rows = pareto.explain(trials(), "data.jsonl")
    text = printed(tables.front(rows))
    assert all(name in " ".join(text.split()) for name in pareto.NAMES)
    lines = tables.commands(rows).splitlines()
    assert len(lines) == 2 * sum(bool(row.names) for row in rows)
    assert all(shlex.split(line)[:3] == ["metapeft", "train", "data.jsonl"] for line in lines[1::2])


def test_trials_say_how_they_ended() -> None:
    done = trials()
    text = printed(tables.trials(done))
    assert text.count("diverged") == 2 and text.count("out of memory") == 1 and "task" not in text
    done[0].task = "another"
    assert "another" in printed(tables.trials(done), 120)


def test_models() -> None:
    row = {
        "name": "task-x",
        "version": 2,
        "aliases": ("champion",),
        "method": "prefix",
        "score": 0.9,
        "standard_error": 0.01,
    }
    text = printed(tables.models([row]))
    assert "champion" in text and "90.0 ± 1.0 %" in text and "prefix tuning" in text


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (wording.duration(0.04), "0.0 s"),
        (wording.duration(9.96), "10 s"),
        (wording.duration(99.6), "100 s"),
        (wording.duration(3599.7), "1 h 0 min"),
        (wording.duration(700), "12 min"),
        (wording.duration(float("nan")), "–"),
        (wording.memory(1023), "1023 MB"),
        (wording.memory(1536), "1.5 GB"),
        (wording.size(0), "–"),
        (wording.size(999), "999 B"),
        (wording.size(1_834_000), "1.8 MB"),
        (wording.size(150_000), "150 kB"),
        (wording.score(0.9474), "94.7 %"),
        (wording.score(None), "–"),
        (wording.plus_minus(0.5, 0.0123), "50.0 ± 1.2 %"),
        (wording.plus_minus(0.5, float("nan")), "50.0 %"),
        (wording.probability(0.0), "0 %"),
        (wording.probability(0.995), "> 99 %"),
        (wording.number(1234567), "1 234 567"),
        (wording.number(0.000123456), "0.0001235"),
        (wording.number(True), "yes"),
        (
            wording.configuration({"method": "lora", "targets": [], "layers": 0}),
            "targets all linear layers, layers all",
        ),
        (wording.configuration({"targets": ["a", "b"], "rank": 8}, ["rank", "targets"]), "rank 8, targets a, b"),
    ],
)
def test_wording(said: str, wanted: str) -> None:
    assert said.replace("\u202f", " ") == wanted
