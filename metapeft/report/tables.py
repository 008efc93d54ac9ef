"""Tables for a terminal: rows in, a rich table out. The rows are what the commands print with --json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from metapeft.report import wording
from metapeft.search import pareto
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from rich.table import Table


def front(rows: Iterable[pareto.Row], title: str = "") -> Table:
    """The Pareto front (`pareto.explain`), best score first. `commands` says what each point is.

    ± is one standard error; the caption says what is a mean over several seeds.
    """
    rows = list(rows)
    table = _table(title, "point", "method", ">validation", ">test", ">time", ">memory", ">adapter")
    for row in rows:
        table.add_row(
            "best in everything" if len(row.names) == len(pareto.NAMES) else ", ".join(row.names),
            wording.method(row.method),
            wording.plus_minus(row.score, row.standard_error),
            wording.score(row.test_score),
            wording.duration(row.seconds),
            wording.memory(row.peak_memory_mb),
            wording.size(row.adapter_bytes),
        )
    seeds = [f"{', '.join(row.names)}: {row.runs}" for row in rows if row.names and row.runs > 1]
    table.caption = f"means over seeds: {'; '.join(seeds)}" if seeds else None
    return table


def order(rows: Sequence[pareto.Row]) -> list[str]:
    """How sure the order of the front is, in a sentence (none for one point)."""
    sure = [row.p_above_next for row in rows if row.p_above_next is not None]
    if not sure:
        return []
    line = "Each point of the front truly scores above the next with a probability of at least "
    line += f"{wording.probability(min(sure))}."
    if min(sure) < 0.9:
        line += " More seeds (sweep.repeats) or a larger validation split would tell more."
    return [line]


def mattered(found: Sequence[Trial]) -> list[str]:
    """What mattered most, in a sentence; none where few trials say nothing."""
    from metapeft.search.importance import importance

    rows = [row for row in importance(found) if row.share >= 0.05]
    said = [
        f"{wording.spoken(r.name)}{f' of {wording.method(r.method)}' if r.method else ''} {wording.score(r.share, 0)}"
        for r in sorted(rows, key=lambda row: -row.share)[:5]
    ]
    return [f"What explains the differences between scores: {', '.join(said)}."] if said else []


def commands(rows: Iterable[pareto.Row]) -> str:
    """The commands that train the named points again, one per line, ready to be copied."""
    return "\n".join(f"# {', '.join(row.names)}\n{row.command}" for row in rows if row.names)


def _table(title: str, *columns: str) -> Table:
    """Columns that start with > are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.caption_justify = "left"
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return table
