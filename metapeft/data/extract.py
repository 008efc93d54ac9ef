"""From the files of a package to rows: one small function per shape of source.

Each takes the folder with the package's files and the arguments written in catalog.yaml, and gives pairs (text,
answer). `tidy` then makes the task's rows of them, the same on every machine.
"""

from __future__ import annotations

import csv
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metapeft.data.splits import normalised
from metapeft.data.task import Kind

Pairs = Iterator[tuple[str, str]]
MAX_ROWS = 4000  # more adds minutes of validation and nothing at the size of these models
MIN_PER_LABEL, SMALL_MIN_PER_LABEL = 20, 4  # the second for tasks of up to 1,000 rows


def sms_spam(folders: list[Path], path: str) -> Pairs:
    with (folders[0] / path).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["text"], "spam" if row["spam"] == "1" else "ham"


def vader(folders: list[Path], path: str) -> Pairs:
    """Mean ratings from -4 to 4; those within half a point of neutral are left out."""
    for line in read(folders[0], path).split("\n")[1:]:
        _, rating, text = line.split("\t", 2) if line else ("", "0", "")
        if abs(float(rating)) > 0.5:
            yield text, "positive" if float(rating) > 0 else "negative"


COARSE = {
    "ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location", "NUM": "number",
}  # fmt: skip
FINE = {
    "ABBR:abb": "abbreviation", "ABBR:exp": "expansion", "DESC:def": "definition", "DESC:desc": "description",
    "DESC:manner": "manner", "DESC:reason": "reason", "ENTY:animal": "animal", "ENTY:body": "body part",
    "ENTY:color": "color", "ENTY:cremat": "creative work", "ENTY:currency": "currency",
    "ENTY:dismed": "disease or medicine", "ENTY:event": "event", "ENTY:food": "food",
    "ENTY:instru": "instrument", "ENTY:lang": "language",
    "ENTY:letter": "letter", "ENTY:other": "other entity", "ENTY:plant": "plant", "ENTY:product": "product",
    "ENTY:religion": "religion", "ENTY:sport": "sport", "ENTY:substance": "substance", "ENTY:symbol": "symbol",
    "ENTY:techmeth": "technique", "ENTY:termeq": "equivalent term", "ENTY:veh": "vehicle", "ENTY:word": "word",
    "HUM:desc": "description of a person", "HUM:gr": "group", "HUM:ind": "individual", "HUM:title": "title",
    "LOC:city": "city", "LOC:country": "country", "LOC:mount": "mountain", "LOC:other": "other location",
    "LOC:state": "state", "NUM:code": "code", "NUM:count": "count", "NUM:date": "date", "NUM:dist": "distance",
    "NUM:money": "money", "NUM:ord": "rank", "NUM:other": "other number", "NUM:perc": "percentage",
    "NUM:period": "duration", "NUM:speed": "speed", "NUM:temp": "temperature", "NUM:volsize": "size",
    "NUM:weight": "weight",
}  # fmt: skip


def trec_coarse(folders: list[Path], path: str) -> Pairs:
    for text, label in trec_fine_codes(folders, path):
        yield text, COARSE[label.split(":")[0]]


def trec_fine(folders: list[Path], path: str) -> Pairs:
    for text, label in trec_fine_codes(folders, path):
        yield text, FINE[label]


def trec_fine_codes(folders: list[Path], path: str) -> Pairs:
    for line in read(folders[0], path).split("\n"):
        if line:
            label, _, text = line.partition(" ")
            yield text, label


def codespell(folders: list[Path], path: str) -> Pairs:
    """`wrong->right` lines; those with several corrections or a remark (a comma) are left out."""
    for line in read(folders[0], path).split("\n"):
        wrong, arrow, right = line.partition("->")
        if arrow and "," not in right:
            yield wrong, right


def country_json(folders: list[Path], path: str, field: str) -> Pairs:
    """One JSON file per country."""
    for file in sorted(folders[0].glob(path)):
        country = json.loads(file.read_text(encoding="utf-8"))
        if country.get("name") and isinstance(country.get(field), str):  # a few have no capital, or several
            yield country["name"], country[field]


def bigbench(folders: list[Path], task: str, target: bool | str = False, strip: Iterable[str] = ()) -> Pairs:
    """A BIG-bench JSON task (its docs/doc.md). `target` false: the best of `target_scores` is the label; true: the
    target, where there is exactly one; "first": the first of several spellings; "label": the only target, without its
    full stop. `strip` holds phrases around the text that are the same in every row."""
    (path,) = folders[0].glob(f"*/bigbench/benchmark_tasks/{task}/task.json")
    for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
        text = example["input"]
        for phrase in strip:
            text = text.replace(phrase, "")
        if not target:
            scores = example["target_scores"]
            label = max(scores, key=scores.__getitem__)
            yield text, label.replace("_", " ").lower()
            continue
        answers = example["target"] if isinstance(example["target"], list) else [example["target"]]
        if target == "first" or len(set(answers)) == 1:
            yield text, answers[0].strip().rstrip(".").lower() if target == "label" else answers[0]


LANGUAGES = {
    "eng": "English", "fra": "French", "deu_1996": "German", "spa": "Spanish", "por_PT": "Portuguese", "ita": "Italian",
    "nld": "Dutch", "pol": "Polish", "ces": "Czech", "slk": "Slovak", "hun": "Hungarian", "ron_2006": "Romanian",
    "swe": "Swedish", "dan": "Danish", "nob": "Norwegian", "fin": "Finnish", "est": "Estonian", "lit": "Lithuanian",
    "tur": "Turkish", "hrv": "Croatian", "cat": "Catalan", "gle": "Irish", "isl": "Icelandic", "ind": "Indonesian",
    "swh": "Swahili", "vie": "Vietnamese", "rus": "Russian", "ukr": "Ukrainian", "bul": "Bulgarian",
    "ell_monotonic": "Greek",
}  # fmt: skip


def udhr(folders: list[Path], path: str) -> Pairs:
    """The sentences of each paragraph: languages that share a script with others, so that letters alone do not tell."""
    for code, language in LANGUAGES.items():
        for paragraph in re.findall(r"<p>(.*?)</p>", read(folders[0], f"{path}/{code}.html"), flags=re.DOTALL):
            text = html.unescape(re.sub(r"<[^>]+>", " ", paragraph))
            for sentence in re.split(r"(?<=[.;:])\s+", " ".join(text.split())):
                if len(sentence) > 15:
                    yield sentence, language


def names(folders: list[Path], path: str) -> Pairs:
    """Two folders: female names, then male names; names in both are left out (by `tidy`, as contradictory)."""
    for folder, label in zip(folders, ("female", "male"), strict=True):
        for name in json.loads(read(folder, path)):
            yield name, label


def movies(folders: list[Path], path: str) -> Pairs:
    short = {"Thriller/Suspense": "thriller"}
    kept = ("Drama", "Comedy", "Action", "Adventure", "Thriller/Suspense", "Horror", "Romantic Comedy")
    for film in json.loads(read(folders[0], path)):
        if film["Major Genre"] in kept and film["Title"]:
            yield str(film["Title"]), short.get(film["Major Genre"], film["Major Genre"].lower())


def world_countries(folders: list[Path], path: str, field: str) -> Pairs:
    for country in json.loads(read(folders[0], path)):
        answer = country["demonyms"].get("eng", {}).get("m") if field == "demonym" else country["subregion"]
        if answer:
            yield country["name"]["common"], answer


def emoji(folders: list[Path], path: str, field: str) -> Pairs:
    """field "group": the name's group; "name": the emoji's name. Flags are left out: they are a list of countries."""
    for symbol, facts in json.loads(read(folders[0], path)).items():
        if facts["group"] != "Flags":
            yield (facts["name"], facts["group"].lower()) if field == "group" else (symbol, facts["name"])


def irregular_plurals(folders: list[Path], path: str) -> Pairs:
    yield from json.loads(read(folders[0], path)).items()


EXTRACTORS = {
    function.__name__: function
    for function in (
        sms_spam, vader, trec_coarse, trec_fine, codespell, country_json, bigbench, udhr, names, movies, 
        world_countries, emoji, irregular_plurals,
    )
}  # fmt: skip


def extract(arguments: dict[str, Any], folders: list[Path], kind: Kind) -> list[dict[str, str]]:
    """Rows by the arguments in catalog.yaml: the first names the function and its path, the rest are passed on."""
    (name, path), *options = arguments.items()
    return tidy(EXTRACTORS[name](folders, path, **dict(options)), kind)


def tidy(pairs: Iterable[tuple[str, str]], kind: Kind) -> list[dict[str, str]]:
    """Rows in an order set by their content: each prompt once, none with contradictory answers, no empty ones, no label
    with fewer than MIN_PER_LABEL rows (SMALL_MIN_PER_LABEL in a small task), MAX_ROWS at most."""
    answers: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    for text, answer in pairs:
        text, answer = text.strip(), answer.strip()
        if text and answer:
            key = normalised(text)
            answers.setdefault(key, set()).add(answer)
            texts[key] = min(texts.get(key, text), text)
    rows = [(texts[key], next(iter(found))) for key, found in answers.items() if len(found) == 1]
    if kind == "classification":
        counts = Counter(answer for _, answer in rows)
        floor = MIN_PER_LABEL if len(rows) > 1000 else SMALL_MIN_PER_LABEL
        rows = [row for row in rows if counts[row[1]] >= floor]
    rows.sort(key=lambda row: hashlib.sha256("\n".join(row).encode()).digest())
    columns = ("text", "label") if kind == "classification" else ("prompt", "completion")
    return [dict(zip(columns, row, strict=True)) for row in rows[:MAX_ROWS]]


def read(folder: Path, path: str) -> str:
    return (folder / path).read_text(encoding="utf-8")
