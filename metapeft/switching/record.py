"""The record of a switched training, on disk before anything depends on it: what a killed one continues from, and what
everybody reads afterwards."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "switching.json"


@dataclass
class Leg:
    """A training with one configuration. how: what it began with (`metapeft.switching.handover`; "" at the start).

    change: of the guard's outputs at its beginning. undone: it lost too much there, or could not be (why),
    and nothing of it was trained. trial:
    its outcome, once it is over. forced: it began because the one before it had failed. returns: it goes on with the
    method in hand, after an exchange was undone.
    """

    configuration: dict[str, Any]
    steps: int
    price: dict[str, float]
    how: str = ""
    source: int | None = None  # the leg whose adapter it began with
    forced: bool = False
    returns: bool = False
    change: dict[str, Any] | None = None
    undone: bool = False
    why: str = ""
    seconds: float = 0.0  # of the handover, measured
    trial: dict[str, Any] | None = None


@dataclass
class Record:
    """decisions: what `decide.to_json` makes, with "leg" and "step" in their evidence. kept: the leg whose adapter is
    the result, with all beneath it. budget_seconds: predicted ones, see `metapeft.switching.prices`."""

    trial: str
    budget_seconds: float
    policy: dict[str, Any]
    alternatives: list[dict[str, Any]]
    calibration: dict[str, float]
    legs: list[Leg] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    kept: int | None = None
    back: bool = False  # whether the last leg was given up for an earlier one at the end
    stopped: bool = False  # whether it was asked to stop

    def switches(self) -> int:
        """Exchanges begun, undone ones too; to go on with the method before is none."""
        return sum(not leg.returns for leg in self.legs[1:])

    def decided(self, leg: int, step: int) -> dict[str, Any] | None:
        """The decision that was made there."""
        places = ((d["evidence"]["leg"], d["evidence"]["step"]) for d in self.decisions)
        return next((d for d, place in zip(self.decisions, places, strict=True) if place == (leg, step)), None)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Record:
        """Raises KeyError, TypeError or ValueError for what is none."""
        values = dict(record)
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        return cls(**(values | {"legs": [Leg(**leg) for leg in values["legs"]]}))

    def save(self, folder: Path) -> None:
        """Replaced as a whole, and on disk when this returns."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{NAME}.partial"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / NAME)

    @classmethod
    def load(cls, folder: Path, trial: str) -> Record | None:
        """The trial's record, if one is there."""
        try:
            found = cls.from_json(json.loads((folder / NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.trial == trial else None
