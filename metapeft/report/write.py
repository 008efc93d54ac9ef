"""The files of a report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from metapeft.errors import UserError
from metapeft.report.page import Content, render


@dataclass(frozen=True)
class Paths:
    """What `write_report` wrote; pictures only where there is something in them."""

    html: Path
    trade_offs: Path
    curves: Path
    parallel: Path


def write_report(folder: Path, content: Content) -> Paths:
    """Writes report.html and its pictures as PNG, each replaced whole. Raises UserError if it cannot."""
    from metapeft.report import pictures

    names = ("report.html", "trade_offs.png", "curves.png", "parallel.png")
    paths = Paths(*(folder / name for name in names))
    page = render(content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        title = content.task.name
        if content.trials:
            title += f": {len(content.trials)} trials"
            pictures.trade_offs(paths.trade_offs, content.feasible(), title, content.untuned(), content.adapters)
            pictures.parallel(paths.parallel, content.feasible(), title, content.adapters)
        if content.trainings():
            pictures.curves(paths.curves, content.trainings(), title, content.untuned(), content.best())
        temporary = paths.html.with_name(".report.html.partial")
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, paths.html)
    except OSError as error:
        raise UserError(
            f"cannot write the report to {folder}: {error.strerror}; choose a folder you may write to"
        ) from error
    return paths
