"""Training on a few shots: from any start, stopped where asked, looked at on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from metapeft.peft import adapters
from metapeft.peft.base import Adapter
from metapeft.peft.prefix import Shots
from metapeft.peft.saved import Saved
from metapeft.runtime import mx
from metapeft.training.session import Session
from metapeft.training.trainer import run_trial
from metapeft.training.trial import Trial

Watch = Callable[[int, Adapter], None]


def train(
    session: Session,
    configuration: dict[str, Any],
    watch: Watch,
    *,
    steps: int,
    at: Collection[int],
    start: Saved | None = None,
    owners: Sequence[int] | None = None,
    seed: int = 0,
) -> Trial:
    """Trains on the session's training split with the schedule of `steps`, and ends after the last step in `at`.

    watch: called with each step in `at` (0: before the first) and the attached adapter. start: the weights to start
    from, which also say the method's configuration; None is the method's own. owners: where the start is a prefix made
    of the training split, which example each of its tokens is of. Nothing is saved and nothing chosen by the validation
    split. A trial that diverged says so in its status. Raises UserError when `start` does not fit.
    """
    held: list[Adapter] = []
    given = None if start is None else adapters.build(start, session.model)
    if start is not None:
        configuration = configuration | start.config.to_json()

    def prepare(adapter: Adapter) -> None:
        held.append(adapter)
        if given is not None:
            adapter.module.update(given.module.parameters())
            mx.eval(adapter.module.parameters())
        if owners is not None:
            adapter.module = Shots(adapter.module(), owners)
        if 0 in at:
            watch(0, adapter)

    def progress(event: dict[str, Any]) -> bool:
        if event["step"] in at:
            watch(event["step"], held[0])
        return bool(event["step"] >= max(at))

    return run_trial(
        session,
        {**configuration, "evaluations": 1},
        steps=steps,
        seed=seed,
        progress=progress,
        test=False,
        prepare=prepare,
        start="" if start is None else digest(start),
    )


def digest(saved: Saved) -> str:
    """16 hex digits of an adapter's weights."""
    found = hashlib.sha256()
    for name in sorted(saved.tensors):
        value = saved.tensors[name].astype(mx.float32)
        found.update(f"{name} {value.shape}".encode())
        found.update(bytes(memoryview(value)))  # type: ignore[arg-type]
    return found.hexdigest()[:16]
