"""Tables for a terminal: rows in, a rich table out. The rows are what the commands print with --json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metapeft.report import wording
from metapeft.search import pareto, spaces
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from rich.table import Table

BAR = 15  # characters of an interval


def recommendation(found: Mapping[str, Any], title: str = "") -> Table:
    """Ranked methods; the expected score with its interval drawn on a scale that all rows share."""
    entries = found["recommendations"]
    scores = [entry["score"] for entry in entries if (entry.get("score") or {}).get("mean") is not None]
    low, high = min((s["low"] for s in scores), default=0.0), max((s["high"] for s in scores), default=1.0)
    level = wording.score(scores[0].get("level"), 0) + " " if scores and scores[0].get("level") else ""
    table = _table(title, "", "method", f"{level}interval", ">expected", ">P(best)", ">time", ">memory", ">adapter")
    for entry in entries:
        score = entry.get("score") or {}
        known = score.get("mean") is not None
        table.add_row(
            str(entry["rank"]),
            wording.method(entry["method"]),
            _interval(score["low"], score["mean"], score["high"], low, high) if known else "",
            wording.score(score["mean"]) if known else "–",
            wording.probability(entry.get("p_best")),
            wording.duration(entry.get("seconds")),
            wording.memory(entry.get("peak_memory_mb")),
            wording.size(entry.get("adapter_bytes")),
        )
    table.caption = "\n".join(f"{e['rank']}  {_settings(e['method'], e['configuration'])}" for e in entries)
    return table


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


def trials(found: Sequence[Trial], title: str = "") -> Table:
    """Trials in their order, with how those that did not end well ended; their task where there are several."""
    several = len({trial.task for trial in found}) > 1
    columns = ("trial", *(("task",) if several else ()), "method", ">validation", ">test", ">time", ">memory", "ended")
    table = _table(title, *columns)
    for trial in found:
        table.add_row(
            trial.id[:8],
            *((trial.task,) if several else ()),
            wording.method(trial.method),
            _score(trial.validation),
            wording.score(trial.score.value if trial.score else None),
            wording.duration(trial.train_seconds or trial.seconds),
            wording.memory(trial.peak_memory_mb),
            "ok" if trial.status == "ok" else f"[red]{wording.ending(trial.status)}[/]",
        )
    return table


def models(rows: Iterable[Mapping[str, Any]], title: str = "") -> Table:
    """Registered adapters, from `RegisteredModel.to_json()`."""
    table = _table(title, "model", ">version", "alias", "method", ">score", ">untuned", ">adapter")
    for row in rows:
        table.add_row(
            str(row["name"]),
            str(row["version"]),
            ", ".join(row.get("aliases") or ()),
            wording.method(str(row.get("method") or "")),
            wording.plus_minus(row.get("score"), row.get("standard_error")),
            wording.score(row.get("untuned_score")),
            wording.size(row.get("adapter_bytes")),
        )
    return table


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


def _settings(method: str, configuration: Mapping[str, Any]) -> str:
    """The learning rate and what is not the default; the command says the rest."""
    from rich.markup import escape

    usual = spaces.defaults(method)
    odd = [n for n in pareto.searched(method) if n == "learning_rate" or configuration.get(n, usual[n]) != usual[n]]
    return escape(wording.configuration(configuration, odd))


def _score(score: Any) -> str:
    return wording.plus_minus(score.value, score.standard_error) if score else "–"


def _interval(low: float, mean: float, high: float, start: float, end: float) -> str:
    """`   ──●──────   `: low to high, with the mean."""
    span = end - start if end > start else 1.0

    def cell(value: float) -> int:
        return min(BAR - 1, max(0, round((value - start) / span * (BAR - 1))))

    cells = ["─" if cell(low) <= i <= cell(high) else " " for i in range(BAR)]
    cells[cell(mean)] = "●"
    return "".join(cells)
