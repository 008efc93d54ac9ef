"""PNG pictures for slides, MLflow and `dvc plots`: the trade-offs and the learning curves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metapeft.report import charts, wording
from metapeft.search import pareto
from metapeft.training.trial import Trial

DPI = 160
CLOSE = 2.0  # between the largest and the smallest value


def trade_offs(
    path: Path, trials: Sequence[Trial], title: str, untuned: float | None = None, adapters: bool = False
) -> None:
    """Score against training time; colour is the method, size the memory, the front is filled and joined."""
    from matplotlib.patheffects import withStroke

    trials = pareto.averaged(trials)
    figure, (axes,) = _figure(1, title)
    points = {t.id: p for t in trials if (p := pareto.objectives(t)) is not None}
    shown = [t for t in trials if t.id in points]
    best = pareto.front(shown, adapters)
    memories = [points[t.id][2] for t in shown]
    times = [points[t.id][1] for t in shown]
    steps = pareto.staircase([points[t.id] for t in best])
    if len(steps) > 1:
        axes.step([p[1] for p in steps], [p[0] for p in steps], where="post", color="#777777", lw=1.2, zorder=1)
    for trial in shown:
        score, seconds, memory = points[trial.id]
        colour = wording.COLOURS.get(trial.method, "#444444")
        low, high = charts.span(trial)
        front = any(trial is other for other in best)
        fill = {"color": colour} if front else {"facecolor": "white", "edgecolor": colour, "alpha": 0.7}
        axes.plot([seconds, seconds], [low, high], color=colour, alpha=0.35, lw=1.2, zorder=1)
        size = 2.4 * charts.radius(memory, memories) ** 2
        axes.scatter(seconds, score, s=size, zorder=3 if front else 2, **fill)
    for identity, text in pareto.titles(best, adapters).items():
        score, seconds, _ = points[identity]
        outline = [withStroke(linewidth=3, foreground="white")]
        place = {"xytext": (8, 7), "textcoords": "offset points"}
        axes.annotate(text, (seconds, score), **place, fontsize=9, weight="bold", path_effects=outline, zorder=4)
    _untuned(axes, untuned)
    axes.set_xlabel("training time")
    axes.set_ylabel(_metric(shown))
    _logarithmic(axes, axes.xaxis, wording.duration, times)
    axes.yaxis.set_major_formatter(lambda value, _: wording.score(value, 0))
    axes.margins(x=0.12)
    _legend(figure, shown)
    _save(figure, path)


def parallel(path: Path, trials: Sequence[Trial], title: str, adapters: bool = False) -> None:
    """Parallel coordinates: every configuration as a line through its settings, score, time and memory."""
    from metapeft.report import parallel as coordinates

    trials = pareto.averaged(trials)
    figure, (axes,) = _figure(1, title)
    figure.set_size_inches(9.6, 4.4)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks([])
    measured = [t for t in trials if pareto.objectives(t) is not None]
    found = coordinates.columns(trials, 10) if measured else []
    front = {t.id for t in pareto.front(trials, adapters)}
    for trial, placed in coordinates.lines(trials, found, adapters):
        best = trial.id in front
        look = {"lw": 2.2 if best else 1.0, "alpha": 1.0 if best else 0.4}
        colour = wording.COLOURS.get(trial.method, "#444444")
        axes.plot([i for i, _ in placed], [place for _, place in placed], color=colour, **look)
    for index, column in enumerate(found):
        axes.axvline(index, color="#aab4c0", lw=1, zorder=0)
        for place, said in column.ticks:
            axes.annotate(said, (index, place), (3, 0), textcoords="offset points", fontsize=7.5, va="center")
    axes.set_xticks(range(len(found)), [wording.spoken(c.name) for c in found], rotation=20, fontsize=8.5)
    axes.set_ylim(-0.04, 1.04)
    _legend(figure, measured)
    _save(figure, path)


def curves(path: Path, trials: Sequence[Trial], title: str, untuned: float | None = None, best: str = "") -> None:
    """Validation score and loss over optimizer steps, one line per trial; `best` is the id of the thick one."""
    figure, panels = _figure(2, title)
    for axes, quantity in zip(panels, ("validation_score", "validation_loss"), strict=True):
        lines = charts.learned(trials, quantity)
        losses = [max(v, charts.TINY_LOSS) for _, known in lines for _, v in known]
        for trial, known in sorted(lines, key=lambda line: line[0].id == best):
            chosen = trial.id == best
            axes.plot(
                [s for s, _ in known],
                [v if quantity == "validation_score" else max(v, charts.TINY_LOSS) for _, v in known],
                color=wording.COLOURS.get(trial.method, "#444444"),
                lw=2.6 if chosen else 1.1,
                alpha=1 if chosen else 0.5,
                marker="o",
                ms=4 if chosen else 2.5,
                ls="-" if trial.status == "ok" else ":",
            )
        axes.set_xlabel("optimizer steps")
        axes.set_xlim(left=0)
        if quantity == "validation_score":
            axes.set_ylabel(_metric(trials))
            axes.yaxis.set_major_formatter(lambda value, _: wording.score(value, 0))
            _untuned(axes, untuned)
        else:
            axes.set_ylabel("validation loss (nats per token)")
            _logarithmic(axes, axes.yaxis, wording.number, losses)
    _legend(figure, trials)
    _save(figure, path)


def _legend(figure: Any, trials: Sequence[Trial]) -> None:
    """The methods' colours, above the pictures."""
    from matplotlib.lines import Line2D

    used = [name for name in wording.METHODS if any(trial.method == name for trial in trials)]
    marks = [
        Line2D([], [], color=wording.COLOURS[name], marker="o", ls="", label=wording.method(name)) for name in used
    ]
    if marks:
        figure.legend(
            handles=marks, loc="outside upper right", ncols=len(marks), frameon=False, fontsize=8.5, handletextpad=0.1
        )


def _figure(panels: int, title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4) if panels == 1 else (9.6, 3.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(color="#e4e7ea", lw=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=9)
    return figure, axes


def _untuned(axes: Any, untuned: float | None) -> None:
    if untuned is not None and math.isfinite(untuned):
        axes.axhline(untuned, color="#777777", lw=1, ls=(0, (2, 3)), zorder=0)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("untuned backbone, test split", (0.01, untuned), (0, 3), **place, fontsize=8, color="#666666")


def _metric(trials: Sequence[Trial]) -> str:
    judged = [score for trial in trials if (score := pareto.judged(trial)) is not None]
    return f"{wording.metric(judged[0].metric)} on validation" if judged else "score on validation"


def _logarithmic(axes: Any, axis: Any, say: Callable[[float], str], values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are labelled in words; between powers of ten the fewer the longer it is, and all
    where the values are so close that there are ticks between whole multiples too."""
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    factor = max(values) / min(values) if values else 1.0
    labelled = (2, 3, 4, 5, 6, 8) if factor < 4 else (2, 3, 5) if factor < 30 else (3,)

    def minor(value: float, _: Any) -> str:
        multiple = value / 10 ** math.floor(math.log10(value) + 1e-9)
        whole = abs(multiple - round(multiple)) < 0.01
        return say(value) if factor < CLOSE or (whole and round(multiple) in labelled) else ""

    axis.set_major_formatter(lambda value, _: say(value))
    axis.set_minor_formatter(minor)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
