"""Great Expectations on good and bad tasks. The import takes seconds, so all tests share one process."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from metapeft.data import load_task
from metapeft.data.task import Example, Task
from metapeft.data.validation import Report, validate
from metapeft.errors import UserError

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(scope="module")
def good() -> Task:
    return load_task(SAMPLES / "tickets.jsonl")


def marks(report: Report) -> dict[str, str]:
    return {check.name: check.mark for check in report.checks}


def test_a_good_task(good: Task) -> None:
    report = validate(good)
    # Ninety rows leave few to test on, and that is said; nothing else is wrong.
    assert {name for name, mark in marks(report).items() if mark != "ok"} == {"test rows"}
    report.raise_on_error()
    (warning,) = report.summary()["warnings"]
    assert "27 rows: a score is uncertain by about 9.6 points" in warning


def test_generation_and_conversations() -> None:
    for name in ("sums", "parity_chat"):
        report = validate(load_task(SAMPLES / f"{name}.jsonl"))
        assert not report.errors and "label set" not in marks(report)


LONG = Example("w", " " + "b" * 3000)
LEAK, ODD, BROKEN = Example("x", " billing"), Example("y", " no label"), Example("CafÃ©", " billing")


@pytest.mark.parametrize(
    ("damage", "check", "mark", "detail"),
    [
        (lambda t: {"test": (*t.test, *t.train[:3])}, "leakage", "error", "6 rows whose prompt"),
        (lambda t: {"test": (*t.test, Example("z", ""))}, "completions not empty", "error", "1 row without text"),
        (lambda t: {"test": (*t.test, Example("  ", " billing"))}, "prompts not empty", "error", "1 row without text"),
        (lambda t: {"test": (*t.test, ODD)}, "label set", "error", "1 row with a label outside the set ('y')"),
        (lambda t: {"validation": ()}, "split sizes", "error", "1 split without rows ('validation')"),
        (
            lambda t: {"train": (*t.train, LEAK, LEAK)},
            "duplicates",
            "warning",
            "2 rows standing more than once ('x', 'x')",
        ),
        (lambda t: {"train": (*t.train, LEAK, Example("X ", " account"))}, "contradictions", "warning", "2 rows whose"),
        (lambda t: {"train": (*t.train, BROKEN)}, "characters", "warning", "1 row with such traces ('CafÃ©')"),
        (lambda t: {"train": (*t.train, Example("x" * 9000, " billing"))}, "prompt lengths", "warning", "over 8,000"),
        (
            lambda t: {"train": (*t.train, LONG), "labels": (*t.labels, "b" * 3000)},
            "completion lengths",
            "warning",
            "over 2,000",
        ),
        (lambda t: {"labels": (*t.labels, "rare")}, "label counts", "warning", "1 label with fewer than 5"),
        (lambda t: {"labels": (*t.labels, "Billing")}, "label spelling", "warning", "'billing', 'Billing'"),
        (lambda t: {"labels": (*t.labels, "a  b", "a b")}, "label spelling", "warning", "'a  b', 'a b'"),
        (lambda t: {"labels": (*t.labels, "1", "1.0")}, "label spelling", "warning", "'1', '1.0'"),
        (lambda t: {"labels": (*t.labels, "caf\u00e9", "cafe\u0301")}, "label spelling", "warning", "2 labels"),
        (
            lambda t: {"train": tuple(Example(f"{i}", " billing") for i in range(900))},
            "label balance",
            "warning",
            "'billing' is the answer of 97% of the rows: consider metric macro_f1",
        ),
    ],
)
def test_each_kind_of_damage_is_found(good: Task, damage, check: str, mark: str, detail: str) -> None:  # type: ignore[no-untyped-def]
    report = validate(replace(good, **damage(good)))
    (found,) = [c for c in report.checks if c.name == check]
    assert (found.mark, found.severity) == (mark, mark)
    assert detail in found.detail
    if mark == "error":
        with pytest.raises(UserError, match="cannot be used"):
            report.raise_on_error()
    else:
        report.raise_on_error()


def test_a_task_without_rows_is_reported_not_raised(good: Task) -> None:
    report = validate(replace(good, train=(), validation=(), test=()))
    assert marks(report)["split sizes"] == "error"


def test_the_report_in_every_form(good: Task) -> None:
    report = validate(replace(good, test=(*good.test, Example("a | <b>", " no label")), notes=("3 rows left out",)))
    record = json.loads(json.dumps(report.to_json()))  # no numpy in it
    assert record["ok"] is False and len(record["checks"]) == len(report.checks)

    text = report.to_text()
    assert all(check.name in text and check.detail in text for check in report.checks) and "3 rows left out" in text

    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == len(report.checks) + 2 and {line.count("|") for line in table} == {4}

    page = Page(report.to_html())
    assert page.cells == [cell for c in report.checks for cell in (c.mark, c.name, c.detail)]
    assert not page.outside


class Page(HTMLParser):
    """The cells of a page's table, and what it would load from elsewhere."""

    def __init__(self, html: str):
        super().__init__()
        self.cells: list[str] = []
        self.outside: list[str] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "td"
        if self.inside:
            self.cells.append("")
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]
        self.outside += [tag] if tag in ("script", "link") else []

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False
