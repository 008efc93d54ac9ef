"""Which configurations a sweep's own limits allow, before any is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from metapeft.errors import UserError
from metapeft.settings import Settings

if TYPE_CHECKING:
    from metapeft.search.spaces import Space
    from metapeft.stages.sweep import Expected


class Budget:
    """Which configurations a sweep's own limits allow: by what a trial is expected to need, at the trial's steps.

    The recommendation's costs are of the final training. From them comes what the counted costs of each method are
    corrected by; counted again is the configuration as the space takes it, without the test split.
    """

    def __init__(self, settings: Settings, space: Space, expected: Expected, steps: int):
        """steps: of the trainings that the recommendation expects."""
        from metapeft.meta.costs import cost

        self.settings, self.space, self.speed = settings.sweep, space, expected.speed
        self.profile = replace(expected.profile, features=expected.profile.features | {"test_examples": 0.0})
        self.corrections: dict[str, tuple[float, float]] = {}
        for entry in expected.recommendations:
            counted = cost(entry["configuration"], expected.profile, expected.speed, steps)
            correction = entry["seconds"] / counted.seconds, entry["peak_memory_mb"] / counted.peak_memory_mb
            self.corrections.setdefault(entry["method"], correction)

    def needs(self, configuration: dict[str, Any]) -> tuple[float, float] | None:
        """Seconds and MiB; None where the method is not searched."""
        from metapeft.meta.costs import cost
        from metapeft.search import spaces

        inside = spaces.project(configuration, self.space)
        if inside is None:
            return None
        steps = inside.pop("steps", self.settings.steps)
        counted = cost(inside, self.profile, self.speed, steps)
        time, memory = self.corrections.get(inside["method"], (1.0, 1.0))
        return counted.seconds * time, counted.peak_memory_mb * memory

    def allowed(self, configurations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that keep the limits, and those of methods that are not searched."""
        found = []
        for configuration in configurations:
            needs = self.needs(configuration)
            if needs is None or all(limit is None or needs[i] <= limit for i, limit in enumerate(self.limits)):
                found.append(configuration)
        return found

    @property
    def limits(self) -> tuple[float | None, float | None]:
        return self.settings.max_trial_seconds, self.settings.max_memory_mb

    def check(self, recommended: Sequence[dict[str, Any]]) -> None:
        """Raises UserError when the limits leave none of what is recommended."""
        from metapeft.meta.recommendation import SMALLER

        trial = f"a trial of {self.settings.steps} steps needs at least"
        texts = (
            ("max_trial_seconds", "--max-trial-seconds", trial, "s", "lower sweep.steps (--steps) or the task's size"),
            ("max_memory_mb", "--max-memory-mb", "a trial needs at least", "MB", SMALLER),
        )
        left = [(c["method"], needs) for c in recommended if (needs := self.needs(c)) is not None]
        for place, (name, option, needed, unit, remedy) in enumerate(texts):
            limit = self.limits[place]
            if limit is None or not left:
                continue
            method, least = min(left, key=lambda each: each[1][place])
            left = [each for each in left if each[1][place] <= limit]
            if not left:
                raise UserError(
                    f"{name}={limit:g} ({option}) excludes every configuration: {needed}"
                    f" {math.ceil(least[place])} {unit} ({method}); raise it, or {remedy}"
                )
