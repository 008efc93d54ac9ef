"""One small source of each shape, written as the packages write theirs."""

import json
from pathlib import Path
from typing import Any

import pytest

from metapeft.data import extract

CASES: list[tuple[str, Any, dict[str, Any], list[tuple[str, str]]]] = [
    ("sms_spam", ',spam,text\n0,0,"Ok, lar"\n1,1,Win now\n', {}, [("Ok, lar", "ham"), ("Win now", "spam")]),
    (
        "vader",
        "id\tsentiment\ttext\r\n1\t2.7\tGood \tday\r\n2\t-0.2\tMeh\r\n3\t-3\tBad\r\n",
        {},
        [("Good \tday", "positive"), ("Bad", "negative")],
    ),
    ("trec_coarse", "NUM:date When ?\nHUM:gr Who ?\n", {}, [("When ?", "number"), ("Who ?", "human")]),
    (
        "trec_fine",
        "NUM:date When ?\nENTY:cremat Which film ?\n",
        {},
        [("When ?", "date"), ("Which film ?", "creative work")],
    ),
    ("codespell", "aach->each\nabd->and, bad,\nacn->can, disabled\n", {}, [("aach", "each")]),
    ("movies", [{"Title": 12, "Major Genre": "Drama"}, {"Title": "X", "Major Genre": None}], {}, [("12", "drama")]),
    (
        "world_countries",
        [
            {"name": {"common": "Brunei"}, "demonyms": {"eng": {"m": "Bruneian"}}, "subregion": "South-Eastern Asia"},
            {"name": {"common": "Nowhere"}, "demonyms": {}, "subregion": ""},
        ],
        {"field": "demonym"},
        [("Brunei", "Bruneian")],
    ),
    (
        "emoji",
        {"😀": {"name": "grinning face", "group": "Smileys & Emotion"}, "🏳": {"name": "flag", "group": "Flags"}},
        {"field": "name"},
        [("😀", "grinning face")],
    ),
    ("irregular_plurals", {"ox": "oxen"}, {}, [("ox", "oxen")]),
]


@pytest.mark.parametrize(("name", "source", "options", "expected"), CASES, ids=[case[0] for case in CASES])
def test_sources(
    tmp_path: Path, name: str, source: Any, options: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    content = source if isinstance(source, str) else json.dumps(source)
    (tmp_path / "file").write_bytes(content.encode())
    assert list(extract.EXTRACTORS[name]([tmp_path], "file", **options)) == expected


def test_countries(tmp_path: Path) -> None:
    for country in (
        {"name": "Peru", "capital": "Lima"},
        {"name": "X", "capital": None},
        {"name": "Y", "capital": ["a"]},
    ):
        (tmp_path / f"{country['name']}.json").write_text(json.dumps(country))
    assert list(extract.country_json([tmp_path], "*.json", field="capital")) == [("Peru", "Lima")]


def test_names_come_from_two_lists(tmp_path: Path) -> None:
    for folder, name in (("a", "Ada"), ("b", "Bob")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "names.json").write_text(json.dumps([name]))
    pairs = list(extract.names([tmp_path / "a", tmp_path / "b"], "names.json"))
    assert pairs == [("Ada", "female"), ("Bob", "male")]


def test_declarations_are_cut_into_sentences(tmp_path: Path) -> None:
    for code in extract.LANGUAGES:
        (tmp_path / f"{code}.html").write_text(
            "<body><p>All are <b>born</b> free &amp; equal. They have reason.</p></body>"
        )
    pairs = list(extract.udhr([tmp_path], "."))
    assert pairs[:2] == [("All are born free & equal.", "English"), ("They have reason.", "English")]
    assert len(pairs) == 2 * len(extract.LANGUAGES)


@pytest.mark.parametrize(
    ("options", "example", "expected"),
    [
        ({}, {"target_scores": {"True": 0, "Not_true": 1}}, [("what", "not true")]),
        ({"target": True}, {"target": "a"}, [("what", "a")]),
        ({"target": True}, {"target": ["a", "a"]}, [("what", "a")]),
        ({"target": True}, {"target": ["a", "b"]}, []),
        ({"target": "first"}, {"target": ["three", "3"]}, [("what", "three")]),
        ({"target": "label"}, {"target": ["Humans."]}, [("what", "humans")]),
        ({"target": True, "strip": ["Say: "]}, {"target": "a"}, [("what", "a")]),
    ],
)
def test_bigbench(
    tmp_path: Path, options: dict[str, Any], example: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    folder = tmp_path / "bigbench-1" / "bigbench" / "benchmark_tasks" / "group" / "task"
    folder.mkdir(parents=True)
    text = "Say: what" if "strip" in options else "what"
    (folder / "task.json").write_text(json.dumps({"examples": [{"input": text, **example}]}))
    assert list(extract.bigbench([tmp_path], "group/task", **options)) == expected
