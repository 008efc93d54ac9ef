"""What `metapeft meta evaluate` leaves behind: evaluation.json, a table in evaluation.md, and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metapeft.files import finite
from metapeft.meta.evaluate import OURS, SBS, Evaluation, Judged
from metapeft.meta.evidence import Known
from metapeft.meta.model import Model

DPI = 130
PICTURES = ("reliability.png", "regret.png", "learning.png", "map.png")


@dataclass(frozen=True)
class Written:
    folder: Path
    files: tuple[str, ...]


def write(found: Evaluation, model: Model, tasks: Sequence[Known], folder: Path) -> Written:
    """Every file is replaced as a whole. tasks: those of the experience, for the map."""
    folder.mkdir(parents=True, exist_ok=True)
    files = ["evaluation.json", "evaluation.md"]
    _replace(folder / files[0], (json.dumps(finite(found.to_json()), indent=1, allow_nan=False) + "\n").encode())
    _replace(folder / files[1], markdown(found).encode())
    if found.tasks:
        _reliability(folder / PICTURES[0], found)
        _regret(folder / PICTURES[1], found.tasks)
        _learning(folder / PICTURES[2], found)
        _map(folder / PICTURES[3], model, tasks, found.tasks)
        files += PICTURES
    return Written(folder, tuple(files))


def rows_of_selectors(found: Evaluation) -> list[dict[str, str]]:
    """For a table: one row per selector."""
    return [
        {
            "selector": row["selector"],
            "regret": f"{row['regret']:.4f} [{row['low']:.4f}, {row['high']:.4f}]",
            "against best by validation": f"{row['regret_corrected']:+.4f}",
            "remaining gap": f"{row['gap']:.2f}",
            "top 1": _share(row["top1"]),
            "top 3": _share(row["top3"]),
            "Spearman": "" if np.isnan(row["spearman"]) else f"{row['spearman']:.2f}",
            "tasks": str(row["tasks"]),
        }
        for row in found.selectors
    ]


def rows_of_targets(found: Evaluation) -> list[dict[str, str]]:
    return [
        {
            "target": t["name"],
            "wanted": t["target"],
            "measured": "" if t["value"] is None else f"{t['value']:.3f}",
            "met": "yes" if t["met"] else "no",
        }
        for t in found.targets
    ]


def markdown(found: Evaluation) -> str:
    """Tables, for a file."""
    s = found.summary
    if not s:
        return (
            "# The meta-model on tasks never seen\n\nToo little experience: no task has four scored configurations.\n"
        )
    numbers = {k: v for k, v in s.items() if isinstance(v, int | float)}
    parts = [
        "# The meta-model on tasks never seen",
        f"{found.trials} trials, {s['tasks']} tasks of {s['families']} families, {s['configurations']} (task, "
        "configuration) pairs. Every family was left out in turn.",
        _table(rows_of_targets(found)),
        _table(rows_of_selectors(found)),
        _table([{"measure": k.replace("_", " "), "value": f"{v:.4g}"} for k, v in numbers.items()]),
        _table(
            [
                {
                    "known tasks": str(r["tasks"]),
                    "remaining gap": f"{r['gap']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
                    "regret": f"{r['regret']:.4f}",
                    "regret of the single best": f"{r['regret_sbs']:.4f}",
                    "judged": str(r["judged"]),
                }
                for r in found.curve
            ]
        ),
        _table(
            [
                {
                    "task": j.task,
                    "family": j.family,
                    "best": f"{j.best:.3f}",
                    "regret": f"{j.regret[OURS]:.3f}",
                    "of the single best": f"{j.regret[SBS]:.3f}",
                    "noise alone": f"{j.floor:.3f}",
                    "chosen": j.chosen[OURS],
                    "tried": str(j.configurations),
                }
                for j in sorted(found.tasks, key=lambda j: -j.regret[OURS])
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row[n] for n in names) + " |" for row in rows)])


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.0%}"


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _reliability(path: Path, found: Evaluation) -> None:
    figure, axes = _figure(10, 3.6, 3)
    for one, name, title in zip(axes, ("within", "best"), ("P(within 1 %)", "P(best)"), strict=False):
        rows = found.summary[f"reliability_{name}"]
        one.plot([0, 1], [0, 1], color="#999999", lw=1)
        sizes = [12 + 180 * r["n"] / max(q["n"] for q in rows) for r in rows]
        one.scatter([r["chance"] for r in rows], [r["share"] for r in rows], s=sizes, color="#1f77b4")
        one.set(xlabel=f"said: {title}", ylabel="happened", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        one.set_title(f"{title}, ECE {found.summary[f'ece_{name}']:.3f}", fontsize=10)
    rows = found.summary["risk_coverage"]
    axes[2].plot([r["answered"] for r in rows], [r["regret"] for r in rows], color="#1f77b4")
    axes[2].set(xlabel="share of tasks answered, surest first", ylabel="mean regret", ylim=(0, None))
    axes[2].set_title("Risk and coverage", fontsize=10)
    _save(figure, path)


def _regret(path: Path, judged: Sequence[Judged]) -> None:
    ordered = sorted(judged, key=lambda j: (j.regret[SBS], j.task))
    figure, (axes,) = _figure(7, 1.2 + 0.19 * len(ordered))
    places = np.arange(len(ordered))
    axes.hlines(places, [j.regret[OURS] for j in ordered], [j.regret[SBS] for j in ordered], color="#cccccc", lw=2)
    axes.scatter([j.regret[SBS] for j in ordered], places, color="#999999", label=SBS, s=22, zorder=2)
    axes.scatter([j.regret[OURS] for j in ordered], places, color="#1f77b4", label=OURS, s=22, zorder=3)
    axes.scatter([j.floor for j in ordered], places, marker="|", color="#d62728", label="noise alone", s=40, zorder=4)
    axes.set_yticks(places, [f"{j.task} ({j.train_examples})" for j in ordered], fontsize=7)
    axes.set(xlabel="regret in test score", xlim=(-0.01, None))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path)


def _learning(path: Path, found: Evaluation) -> None:
    figure, (axes,) = _figure(5, 3.4)
    tasks = [r["tasks"] for r in found.curve]
    axes.axhline(1, color="#999999", lw=1)
    axes.fill_between(
        tasks, [r["low"] for r in found.curve], [r["high"] for r in found.curve], color="#1f77b4", alpha=0.2
    )
    axes.plot(tasks, [r["gap"] for r in found.curve], color="#1f77b4", marker="o")
    axes.set(xlabel="known tasks", ylabel="remaining gap", ylim=(0, None))
    axes.set_title("1: always the same configuration; 0: the oracle", fontsize=9)
    _save(figure, path)


def _map(path: Path, model: Model, tasks: Sequence[Known], judged: Sequence[Judged]) -> None:
    profiled = [t for t in tasks if t.features is not None]
    figure, (axes,) = _figure(8, 6)
    if len(profiled) > 2:
        points = coordinates(model, profiled)
        families = sorted({t.family for t in profiled})
        for task, (x, y) in zip(profiled, points, strict=True):
            axes.scatter(x, y, color=f"C{families.index(task.family) % 10}", s=18)
            axes.annotate(task.name, (x, y), fontsize=6, xytext=(3, 2), textcoords="offset points")
    axes.set(xticks=[], yticks=[])
    axes.set_title("Tasks by the learned metric (two principal components)", fontsize=10)
    _save(figure, path)


def coordinates(model: Model, tasks: Sequence[Known]) -> np.ndarray:
    """(tasks, 2): principal components of the learned embedding, signs fixed."""
    points = np.array([model.metric.embed(t) for t in tasks])
    points = points - points.mean(axis=0)
    _, _, axes = np.linalg.svd(points, full_matrices=False)
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    found: np.ndarray = points @ (axes * signs[:, None])[:2].T
    return found


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=DPI, format="png")
    os.replace(temporary, path)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
