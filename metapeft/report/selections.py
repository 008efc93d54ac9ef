"""A picture of how selection strategies compare: differences with intervals, over all tasks and by domain."""

from __future__ import annotations

from pathlib import Path

from metapeft.errors import UserError
from metapeft.tracking.selections import LEVEL, Comparison


def draw(found: Comparison, path: Path) -> Path:
    """Writes a PNG or SVG. Raises UserError where no two strategies share a task, or the file cannot be written."""
    if not found.pairs:
        raise UserError("no two selection strategies have run on the same task; there is nothing to draw yet")
    from matplotlib.figure import Figure

    pairs = found.pairs[::-1]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(pairs)), layout="constrained")
    axes = figure.add_subplot()
    for row, pair in enumerate(pairs):
        sure = not pair.verdict.startswith("cannot")
        axes.errorbar(
            pair.difference,
            row,
            xerr=[[max(0.0, pair.difference - pair.low)], [max(0.0, pair.high - pair.difference)]],
            fmt="o",
            capsize=4,
            color="#1b6e4b" if sure else "#777777",
        )
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{p.first} − {p.second}\n{p.domain}, {p.tasks} tasks" for p in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.set_xlabel(f"difference of the test score, {LEVEL:.0%} interval")
    axes.set_title("Selection strategies on the same tasks (grey: cannot tell)", fontsize=10)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write {path} ({error}); give a .png or .svg file in a folder you may write in"
        ) from error
    return path
