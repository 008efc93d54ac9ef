"""The picture of a switched training."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metapeft.report import switched, write_report
from metapeft.report.page import render
from tests.report import examples
from tests.switching import made


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a real training on a tiny model."""
    folder = tmp_path_factory.mktemp("switched") / "x"
    _, found = made.train(made.session(), folder, "p_tuning", "lora", steps=60, lora=0.9)
    return found.to_json()


def test_parts_lie_one_after_another(record: dict[str, Any]) -> None:
    first, second = switched.parts(record)
    assert (first.method, second.method, second.how) == ("p_tuning", "lora", "frozen")
    assert first.points[-1].taken == "lora" and all(p.taken == "" for p in second.points)
    assert second.curve[0][0] > first.curve[-1][0]
    assert all(p.low <= p.high for leg in (first, second) for p in leg.points)


def test_the_chart_shows_every_decision_and_is_well_formed(record: dict[str, Any]) -> None:
    for width in (820, 358):
        drawn = ElementTree.fromstring(switched.chart(record, width, 0.3))
        assert len(drawn.findall(".//circle")) == len(record["decisions"])
        assert len([g for g in drawn.findall("g") if g.get("class", "").startswith("line best")]) == 2


def test_the_page_has_it_only_where_there_is_one(record: dict[str, Any], tmp_path: Path) -> None:
    content = examples.content()
    heading = "How the method was chosen on the way"
    assert heading not in render(content)
    page = write_report(tmp_path, replace(content, switching=record)).html.read_text(encoding="utf-8")
    assert heading in page and "changed to LoRA" in page and "change to LoRA" in page
    assert page.count('<tr><td class="n">') >= len(record["decisions"])


def test_what_happened_is_said(record: dict[str, Any]) -> None:
    assert switched.sentence(record).startswith("Training began with P-tuning and changed to LoRA.")
    alone = record | {"legs": record["legs"][:1], "decisions": []}
    assert "never changed its method" in switched.sentence(alone)
    undone = [record["legs"][0], record["legs"][1] | {"undone": True, "trial": None}]
    assert "1 exchange was undone" in switched.sentence(record | {"legs": undone})


def test_the_command_of_a_switched_training(tmp_path: Path) -> None:
    from metapeft.search.pareto import command

    trial, _ = made.train(made.session(), tmp_path / "x", "lora", steps=12)
    said = command(trial, "mine.jsonl")
    assert said.startswith("metapeft train mine.jsonl --method lora --steps 12 --switch")
    assert "--set rank=2" in said
