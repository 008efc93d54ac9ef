"""The catalog is consistent, and what it lists can be fetched and has the listed hash."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from metapeft.data import catalog, load_task
from metapeft.data.catalog_update import DOCS, table_row
from metapeft.data.extract import EXTRACTORS, MAX_ROWS, tidy
from metapeft.data.templates import check_template
from metapeft.errors import MetapeftError, UserError

ENTRIES = {entry.name: entry for entry in catalog.entries()}


def test_every_entry_is_whole() -> None:
    assert len(ENTRIES) >= 49
    assert set(json.loads(catalog.LOCK.read_text())) == set(ENTRIES)
    for entry in ENTRIES.values():
        assert next(iter(entry.extract)) in EXTRACTORS
        assert set(entry.archives) <= set(catalog.archives())
        assert entry.licence and entry.family and entry.source
        assert 100 <= entry.rows <= MAX_ROWS and len(entry.sha256) == 64
        assert (entry.labels >= 2) == (entry.kind == "classification")
        assert not entry.template or check_template(entry.template)
        assert len(entry.template.replace("{text}", "").replace("{labels}", "").split()) <= 10


def test_archives_have_hashes_and_are_used() -> None:
    used = {name for entry in ENTRIES.values() for name in entry.archives}
    for archive in catalog.archives().values():
        assert archive.name in used and len(archive.sha256) == 64 and archive.members
        assert archive.registry in ("pypi-wheel", "pypi-sdist", "npm")


def test_enough_families_to_leave_one_out() -> None:
    assert len({entry.family for entry in ENTRIES.values()}) >= 12


def test_the_documentation_lists_the_catalog() -> None:
    table = [line + "\n" for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert table == [table_row(entry, entry.rows, entry.labels) for entry in ENTRIES.values()]


def test_unknown_names_are_corrected() -> None:
    with pytest.raises(UserError, match="did you mean country_capital"):
        catalog.get("country_capitol")


def fetch(name: str) -> None:
    catalog.fetch(name)


@pytest.mark.network
def test_fetching_from_pypi(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = multiprocessing.get_context("spawn")  # two processes at once, for two tasks of one package
    processes = [spawn.Process(target=fetch, args=(name,)) for name in ("country_capital", "country_region")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]

    path = home / "data" / "country_capital.jsonl"
    assert {"prompt": "Japan", "completion": "Tokyo"} in [json.loads(line) for line in path.read_text().splitlines()]
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["licence"] == "MIT" and "countryinfo" in facts["source"] and facts["sha256"]

    task = load_task("country_capital")
    assert (task.kind, task.family, task.licence) == ("generation", "knowledge", "MIT")
    assert str(task.train[0].prompt).endswith("\nCapital:")
    assert load_task("country_region").labels == ("Africa", "Americas", "Asia", "Europe", "Oceania")

    # All is at hand now: a damaged file is made again without a download.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert catalog.fetch("country_capital").read_bytes() == whole

    # Other rows than the listed ones are refused, and do not stay.
    wrong = replace(ENTRIES["country_capital"], sha256="0" * 64)
    monkeypatch.setattr(catalog, "get", lambda name: wrong)
    path.unlink()
    with pytest.raises(MetapeftError, match="not 000000000000…"):
        catalog.fetch("country_capital")
    assert not path.exists()


@pytest.mark.network
def test_fetching_from_npm() -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not here")
    rows = [json.loads(line) for line in catalog.fetch("irregular_plural").read_text().splitlines()]
    assert {"prompt": "ox", "completion": "oxen"} in rows and len(rows) == ENTRIES["irregular_plural"].rows


def test_rows_are_tidied_the_same_in_any_order() -> None:
    pairs = [(f"text {i}", "ab"[i % 2]) for i in range(50)]
    pairs += [("TEXT  1", "b"), ("text 2", "b"), ("", "a"), ("only one", "c")]
    rows = tidy(pairs, "classification")
    assert rows == tidy(reversed(pairs), "classification")
    texts = {row["text"].lower() for row in rows}
    # Empty, contradictory (text 2 is a and b) and too rare ones are out; a repeated one is in once.
    assert len(rows) == 49 and "text 2" not in texts and "only one" not in texts
    assert [row["text"] for row in rows if " ".join(row["text"].lower().split()) == "text 1"] == ["TEXT  1"]
