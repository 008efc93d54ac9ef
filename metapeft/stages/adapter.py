"""The adapter that the stage `train` left, and no other: two commands may have worked in one folder."""

from __future__ import annotations

from pathlib import Path

from metapeft.errors import UserError
from metapeft.peft.saved import Saved
from metapeft.training.trial import Trial


def read_adapter(work: Path, trial: Trial) -> Saved:
    """Raises UserError where its own metadata names another trial."""
    from metapeft.peft import checkpoints

    folder = work / "train" / "adapter"
    saved = checkpoints.read(folder)
    made = saved.metadata.get("trial")
    if isinstance(made, dict) and made.get("id", trial.id) != trial.id:
        raise UserError(f"{folder} is the adapter of trial {made['id']}, not of {trial.id}; run the stage train again")
    return saved
