"""A meta-learned start: Reptile (Nichol, Achiam and Schulman 2018, arXiv:1803.02999) over other tasks.

Each round trains a few steps on one task from the present start, and moves the start a part of the way to where that
ended. It is first-order MAML without its gradients through training, and works for whatever weights a method trains:
LoRA's matrices, the tokens of a prompt, the keys and values of a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from metapeft.backbones import Backbone
from metapeft.data.shots import spelled
from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.fewshot.train import train
from metapeft.peft import adapters, checkpoints
from metapeft.peft.base import Adapter
from metapeft.peft.saved import Saved
from metapeft.runtime import mx
from metapeft.settings import home
from metapeft.training.session import Session

INNER = 5  # steps on one task
FIRST, LAST = 1.0, 0.1  # part of the way that the start moves, falling evenly
SAVED = 10  # rounds between two states on disk


@dataclass(frozen=True)
class Learned:
    """A meta-learned start. tasks: names, in the order of first use; families: theirs."""

    saved: Saved
    rounds: int
    tasks: tuple[str, ...]
    families: tuple[str, ...]


def place(backbone: Backbone, method: str) -> Path:
    """Where the meta-learned start of a method lies."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", Path(backbone.id).name).strip("-")
    return home() / "library" / f"{slug}-{backbone.content_id[:8]}" / ".starts" / method


def read(folder: Path) -> Learned | None:
    """What `reptile` left in a folder, finished or not; None when nothing is there."""
    try:
        saved = checkpoints.read(folder)
        about = saved.metadata["reptile"]
        return Learned(saved, int(about["rounds"]), tuple(about["tasks"]), tuple(about["families"]))
    except (UserError, KeyError, TypeError):
        return None


def reptile(
    backbone: Backbone,
    tasks: Sequence[Task],
    configuration: dict[str, Any],
    *,
    rounds: int,
    folder: Path,
    inner: int = INNER,
    seed: int = 0,
    report: Callable[[int, float], bool | None] | None = None,
) -> Learned:
    """Learns a start in `folder`, a sealed adapter folder, from the tasks' training splits; goes on from what is there.

    report: called after each round with their number and the mean loss of its steps; returning True ends the learning,
    to be continued. Raises UserError when there are no tasks.
    """
    if not tasks:
        raise UserError(
            "there are no tasks to learn a start from: the adapter library holds none of the catalog; train on some"
            " (`metapeft train NAME`), or name them with --tasks"
        )
    found = read(folder)
    state = found.saved if found is not None else None
    about = found.saved.metadata["reptile"] if found is not None else {}
    done = found.rounds if found is not None else 0
    sessions: dict[int, Session] = {}
    for number in range(done, rounds):
        turn, which = divmod(number, len(tasks))
        index = int(np.random.default_rng((seed, turn)).permutation(len(tasks))[which])
        if index not in sessions:
            task = tasks[index]
            cut = replace(task, validation=task.validation[:1], test=spelled(task))
            sessions[index] = Session(backbone, cut, next(iter(sessions.values()), None))
        ended, loss = _round(sessions[index], configuration, state, inner, seed + number)
        part = FIRST + (LAST - FIRST) * number / max(1, rounds - 1)
        state = ended if state is None or ended is None else toward(state, ended, part)
        if state is None:
            raise UserError("the first round diverged; give a lower learning_rate")
        stop = report is not None and bool(report(number + 1, loss))
        if stop or (number + 1) % SAVED == 0 or number + 1 == rounds:
            _write(folder, state, backbone, number + 1, tasks, about)
        if stop:
            break
    learned = read(folder)
    assert learned is not None
    return learned


def _round(
    session: Session, configuration: dict[str, Any], state: Saved | None, inner: int, seed: int
) -> tuple[Saved | None, float]:
    """Where training ends (None when it diverged), and the mean loss on the way."""
    ended: list[Saved] = []

    def watch(step: int, adapter: Adapter) -> None:
        ended.append(adapters.take(adapter, {}))
        mx.eval(ended[-1].tensors)

    trial = train(session, configuration, watch, steps=inner, at=[inner], start=state, seed=seed)
    loss = float(trial.curve[-1]["train_loss"]) if trial.curve else float("nan")
    return (ended[-1] if ended and trial.status != "diverged" else None), loss


def toward(state: Saved, ended: Saved, part: float) -> Saved:
    """`part` of the way from one adapter's weights to another's."""
    tensors = {name: value + part * (ended.tensors[name] - value) for name, value in state.tensors.items()}
    mx.eval(tensors)
    return replace(ended, tensors=tensors)


def _write(
    folder: Path, state: Saved, backbone: Backbone, rounds: int, tasks: Sequence[Task], before: dict[str, Any]
) -> None:
    """before: what is there; a start that goes on with other tasks has still learned from the earlier ones."""
    names = list(dict.fromkeys([*before.get("tasks", ()), *(task.name for task in tasks)]))
    families = sorted({*before.get("families", ()), *(task.family or task.name for task in tasks)})
    licences = before.get("licences", {}) | {task.name: task.licence for task in tasks}
    about = {"rounds": rounds, "tasks": names, "families": families, "licences": licences}
    metadata = {key: value for key, value in state.metadata.items() if key in ("layers", "kv_heads")}
    checkpoints.write(folder, replace(state, metadata=metadata | {"backbone": backbone.id, "reptile": about}))
