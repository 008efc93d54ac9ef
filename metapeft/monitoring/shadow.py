"""Shadow trials: now and then the runner-up is trained beside what was chosen, to know what the choice was worth.

Without them regret is only known where somebody ran a sweep. One trial per decision, at the budget, seed and split
sizes of the first choice's own trial, the latest decisions first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from metapeft.data.task import Task
from metapeft.errors import MetapeftError
from metapeft.meta import decisions as given
from metapeft.meta.evidence import key
from metapeft.meta.experience import Experience
from metapeft.monitoring.outcomes import joined
from metapeft.progress import say
from metapeft.search.slots import Slots
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

Find = Callable[[dict[str, Any]], Task | None]


def due(entries: Sequence[dict[str, Any]], trials: Sequence[Trial]) -> list[tuple[dict[str, Any], Trial]]:
    """Decisions whose first choice was trained and nothing else of the list, with that trial; the latest first. Not
    those whose runner-up was trained in the same way, whatever came of it and whichever decision it counts for."""
    by_id = {trial.id: trial for trial in trials}
    trained = {_work(trial, key(trial.configuration)) for trial in trials}
    listed = {entry["id"]: entry for entry in entries}
    found = []
    for decision in reversed(joined(entries, trials)):
        if decision.kind.tried == 1:
            entry = listed[decision.id]
            first, *others = (key(each["configuration"]) for each in entry["recommendations"])
            own = [by_id[id] for id in decision.followed if key(by_id[id].configuration) == first]
            useful = own and own[-1].score is not None and others
            if useful and _work(own[-1], others[0]) not in trained:
                found.append((entry, own[-1]))
    return found


def _work(like: Trial, configuration: str) -> tuple[str, str, int, int, str]:
    """What a configuration's training is, at the budget and seed of another trial."""
    return like.task_version, like.backbone, like.budget, like.seed, configuration


def run(count: int, find: Find, backbone: Callable[[str], Backbone]) -> list[Trial]:
    """Up to `count` shadow trials, each added to the experience as soon as it ends.

    find: the task of a decision, None where its rows are no longer here. backbone: loads one by its id.
    """
    from metapeft.training.session import Session
    from metapeft.training.trainer import run_trial

    store, load = Experience(), cache(backbone)
    done: list[Trial] = []
    for entry, first in due(given.read(), store.trials()):
        if len(done) == count:
            break
        task = find(entry)
        if task is None:
            continue
        second = entry["recommendations"][1]["configuration"]
        with Slots(1).place(None) as turn:
            if turn is None:
                break
            try:
                session = Session(load(entry["backbone"]), task)
                if first.untuned_score is not None:
                    session.untuned["test"] = first.untuned_score
                trial = run_trial(session, second, steps=first.budget, seed=first.seed)
            except MetapeftError as error:
                say(f"no shadow trial on {task.name}: {error}")
                continue
        store.append(trial)
        done.append(trial)
        result = f"{trial.score.value:.3f}" if trial.score else trial.status
        say(f"shadow trial on {task.name}: the runner-up {trial.method} got {result}, the first {first.method}"
            f" {first.score.value if first.score else float('nan'):.3f}")  # fmt: skip
    return done
