from __future__ import annotations

import shlex
from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from metapeft.report import tables, wording
from metapeft.search import pareto
from tests.report.examples import trials


def printed(table: Table, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue().replace("\u202f", " ")  # type: ignore[attr-defined, no-any-return]


def test_the_table_fits_eighty_columns() -> None:
    text = printed(tables.front(pareto.explain(trials()), "The front"))
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_front_and_commands() -> None:
    rows = pareto.explain(trials(), "data.jsonl")
    text = printed(tables.front(rows))
    assert all(name in " ".join(text.split()) for name in pareto.NAMES)
    lines = tables.commands(rows).splitlines()
    assert len(lines) == 2 * sum(bool(row.names) for row in rows)
    assert all(shlex.split(line)[:3] == ["metapeft", "train", "data.jsonl"] for line in lines[1::2])


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
