"""Checks of a task before computing is spent on it, run by Great Expectations on the task's rows.

An error means that training or its score would be wrong; a warning that a person should look.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from metapeft.data.splits import canonical, counted, normalised
from metapeft.data.task import SPLITS, Task
from metapeft.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

Severity = Literal["error", "warning"]
LONG_PROMPT, LONG_COMPLETION = 8_000, 2_000  # characters; about 2,000 and 500 tokens
FEW_TEST_ROWS = 100  # below, the score's standard error exceeds 4 to 5 points
RARE_LABEL, MAJORITY = 5, 0.90
COLUMNS = ("split", "prompt", "completion")


@dataclass(frozen=True)
class Check:
    """One expectation: `detail` says in words what was found. `severity` is that of a failure."""

    name: str
    ok: bool
    severity: Severity
    detail: str

    @property
    def mark(self) -> str:
        return "ok" if self.ok else self.severity


@dataclass(frozen=True)
class Report:
    """All checks of one task."""

    task: str
    version: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.mark == "error")

    @property
    def warnings(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.mark == "warning")

    def raise_on_error(self) -> None:
        """Raises UserError naming what is wrong, when something is."""
        if self.errors:
            found = "; ".join(f"{check.name}: {check.detail}" for check in self.errors)
            raise UserError(f"the data of {self.task} cannot be used: {found}; correct the data and run again")

    def summary(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "version": self.version,
            "checks": len(self.checks),
            "errors": len(self.errors),
            "warnings": [f"{check.name}: {check.detail}" for check in self.warnings],
        }

    def to_json(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {
            "task": self.task,
            "version": self.version,
            "ok": not self.errors,
            "checks": checks,
            "notes": [*self.notes],
        }

    def to_text(self) -> str:
        """A table for a terminal."""
        width = max(len(check.name) for check in self.checks)
        lines = [self.title(), *(f"{c.mark:8}{c.name:{width}}  {c.detail}" for c in self.checks), *self.notes]
        return "\n".join(lines) + "\n"

    def to_markdown(self) -> str:
        rows = [f"| {c.mark} | {c.name} | {c.detail.replace('|', '/')} |" for c in self.checks]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"# {self.title()}", "", "| | check | found |", "|---|---|---|", *rows, "", *notes]) + "\n"

    def to_html(self) -> str:
        """A page that stands alone: no script, no outside file."""
        rows = "".join(
            f'<tr class="{c.mark}"><td>{c.mark}</td><td>{escape(c.name)}</td><td>{escape(c.detail)}</td></tr>'
            for c in self.checks
        )
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return PAGE.format(title=escape(self.title()), rows=rows, notes=f"<ul>{notes}</ul>" if notes else "")

    def title(self) -> str:
        found = f"{counted(len(self.errors), 'error')}, {counted(len(self.warnings), 'warning')}"
        return f"Data of {self.task} ({self.version}): {found}"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #8884; vertical-align: top; }}
td:first-child {{ font-weight: 600; white-space: nowrap; }}
.ok td:first-child {{ color: light-dark(#1a7f37, #3fb950); }}
.warning td:first-child {{ color: light-dark(#9a6700, #d29922); }}
.error td:first-child {{ color: light-dark(#cf222e, #f85149); }}
</style>
<h1>{title}</h1>
<table><thead><tr><th>result</th><th>check</th><th>found</th></tr></thead><tbody>{rows}</tbody></table>
{notes}
</html>
"""


def validate(task: Task) -> Report:
    """Check columns, empties, lengths, label set, duplicates, leakage between splits, split sizes and label balance.

    Never raises for bad data: the report says it, and `Report.raise_on_error` stops.
    """
    import pandas as pd

    rows = pd.DataFrame(
        [(s, canonical(e.prompt), e.completion) for s in SPLITS for e in task.split(s)], columns=list(COLUMNS)
    )
    # What Great Expectations has no expectation for becomes a column that it has one for.
    same = [normalised(prompt) for prompt in rows["prompt"]]
    places: dict[str, set[str]] = {}
    answers: dict[str, set[str]] = {}
    for key, split, completion in zip(same, rows["split"], rows["completion"], strict=True):
        places.setdefault(key, set()).add(split)
        answers.setdefault(key, set()).add(completion)
    derived = rows.assign(
        same=same,
        answer=rows["completion"].str.strip(),
        splits=[len(places[key]) for key in same],
        answers=[len(answers[key]) for key in same],
    )
    splits = pd.DataFrame({"split": list(SPLITS), "rows": [len(task.split(split)) for split in SPLITS]})
    checks = [*check_rows(task, rows, derived), *check_splits(splits)]
    if task.kind == "classification":
        checks += check_labels(task)
    return Report(task.name, task.version, tuple(checks), task.notes)


def check_rows(task: Task, rows: pd.DataFrame, derived: pd.DataFrame) -> list[Check]:
    gxe = expectations()
    expect = Expectations(rows, "row", "prompt")
    checks = [
        expect(
            "columns",
            "error",
            gxe.ExpectTableColumnsToMatchSet(column_set=list(COLUMNS)),
            ", ".join(COLUMNS),
            numbered=False,
        ),
    ]
    expect = Expectations(derived, "row", "prompt")
    for column in ("prompt", "completion"):
        something = gxe.ExpectColumnValuesToMatchRegex(column=column, regex=r"\S")
        checks.append(
            expect(f"{column}s not empty", "error", something, f"all {len(rows):,} hold text", "without text")
        )
        limit = LONG_PROMPT if column == "prompt" else LONG_COMPLETION
        short = gxe.ExpectColumnValueLengthsToBeBetween(column=column, max_value=limit)
        longest = int(rows[column].str.len().max()) if len(rows) else 0
        checks.append(
            expect(
                f"{column} lengths", "warning", short, f"longest {longest:,} characters", f"over {limit:,} characters"
            )
        )
    readable = gxe.ExpectColumnValuesToNotMatchRegex(column="prompt", regex="\ufffd|\u00c3[\u0080-\u00bf]|\u00e2\u20ac")
    checks.append(expect("characters", "warning", readable, "no traces of a wrong encoding", "with such traces"))
    once = gxe.ExpectCompoundColumnsToBeUnique(column_list=["same", "completion"])
    checks.append(expect("duplicates", "warning", once, "no row stands twice", "standing more than once"))
    one_answer = gxe.ExpectColumnValuesToBeBetween(column="answers", max_value=1)
    checks.append(
        expect(
            "contradictions", "warning", one_answer, "each prompt has one answer", "whose prompt has several answers"
        )
    )
    apart = gxe.ExpectColumnValuesToBeBetween(column="splits", max_value=1)
    checks.append(
        expect("leakage", "error", apart, "no prompt stands in two splits", "whose prompt stands in another split too")
    )
    if task.kind == "classification":
        known = gxe.ExpectColumnValuesToBeInSet(column="answer", value_set=list(task.labels))
        checks.append(expect("label set", "error", known, f"{len(task.labels)} labels", "with a label outside the set"))
    return checks


def check_splits(splits: pd.DataFrame) -> list[Check]:
    gxe = expectations()
    sizes = ", ".join(f"{row.split} {row.rows:,}" for row in splits.itertuples())
    filled = gxe.ExpectColumnValuesToBeBetween(column="rows", min_value=1)
    checks = [Expectations(splits, "split", "split")("split sizes", "error", filled, sizes, "without rows")]
    test = splits[splits["split"] == "test"].reset_index(drop=True)
    enough = gxe.ExpectColumnValuesToBeBetween(column="rows", min_value=FEW_TEST_ROWS)
    rows = int(test["rows"][0])
    # The standard error of a proportion of one half, the largest there is.
    error = f"{rows:,} rows: a score is uncertain by about {100 * (0.25 / max(rows, 1)) ** 0.5:.1f} points"
    checks.append(Expectations(test, "split", "split")("test rows", "warning", enough, error, error, numbered=False))
    return checks


def check_labels(task: Task) -> list[Check]:
    import pandas as pd

    gxe = expectations()
    trained = Counter(example.completion.strip() for example in task.train)
    total = Counter(example.completion.strip() for split in SPLITS for example in task.split(split))
    spellings = Counter(map(_sounds, task.labels))
    labels = pd.DataFrame(
        {
            "label": list(task.labels),
            "train": [trained[label] for label in task.labels],
            "share": [total[label] / max(1, total.total()) for label in task.labels],
            "alike": [spellings[_sounds(label)] for label in task.labels],
        }
    )
    expect = Expectations(labels, "label", "label")
    enough = gxe.ExpectColumnValuesToBeBetween(column="train", min_value=RARE_LABEL)
    fewest = f"at least {int(labels['train'].min()):,} training rows each"
    label, count = (total.most_common(1) or [("", 0)])[0]
    share = f"{label!r} is the answer of {count / max(1, total.total()):.0%} of the rows"
    balanced = gxe.ExpectColumnMaxToBeBetween(column="share", max_value=MAJORITY)
    spelled = gxe.ExpectColumnValuesToBeBetween(column="alike", max_value=1)
    return [
        expect("label counts", "warning", enough, fewest, f"with fewer than {RARE_LABEL} training rows"),
        expect("label balance", "warning", balanced, share, f"{share}: consider metric macro_f1", numbered=False),
        expect(
            "label spelling",
            "warning",
            spelled,
            "no labels differ by spelling only",
            "that another is like but for case, spaces, or how a letter or a number is written",
        ),
    ]


def _sounds(label: str) -> str:
    """The same for labels that a person would take for one: New York and new  york, 1 and 1.0."""
    plain = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    try:
        return str(float(plain))
    except ValueError:
        return plain


def expectations() -> Any:
    """Great Expectations' expectation classes (the import takes seconds)."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")  # it reports use to its makers otherwise
    import great_expectations.expectations

    return great_expectations.expectations


class Expectations:
    """Runs single expectations on a data frame in a Great Expectations context that exists in memory only."""

    def __init__(self, frame: pd.DataFrame, noun: str, shown: str):
        """What one row of the frame is called, and the column that shows it to a person."""
        import great_expectations as gx

        self.frame, self.noun, self.shown = frame, noun, shown
        from great_expectations.data_context.types.base import ProgressBarsConfig

        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        asset = context.data_sources.add_pandas("rows").add_dataframe_asset("rows")
        definition = asset.add_batch_definition_whole_dataframe("rows")
        self.batch = definition.get_batch(batch_parameters={"dataframe": frame})

    def __call__(
        self,
        name: str,
        severity: Severity,
        expectation: Any,
        good: str,
        bad: str = "",
        numbered: bool = True,
    ) -> Check:
        """One check. `good` is its detail when met; else `bad`, if `numbered` after the number of rows it is about."""
        outcome = self.batch.validate(expectation, result_format="COMPLETE")  # with the indices of bad rows
        if outcome.exception_info.get("raised_exception"):
            raise RuntimeError(f"{name}: {outcome.exception_info['exception_message']}")
        if bool(outcome.success):  # a numpy bool
            return Check(name, True, severity, good)
        if not numbered:
            return Check(name, False, severity, bad)
        where = outcome.result["unexpected_index_list"]
        shown = ", ".join(repr(str(value)[:40]) for value in self.frame[self.shown].iloc[where[:3]])
        return Check(name, False, severity, f"{counted(len(where), self.noun)} {bad} ({shown})")
