"""What training costs in predicted seconds, so that a budget means the same for every method.

A switched training counts what it does in the seconds that `metapeft.meta.costs` predicts for this machine, corrected
by the trials that ran on it, not in those that pass: other work on the machine must not decide for a method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from metapeft.meta import costs
from metapeft.profiling import Profile
from metapeft.profiling.speed import Speed
from metapeft.switching.handover import CONFIRMED, DISTILL_STEPS, How, exact
from metapeft.training.trainer import SAMPLE
from metapeft.training.trial import Trial

FEW, MANY = 20, 120  # steps between which cost is measured: it is a line
SLOWER = 2.5  # a step of distillation, which the native decoder does not compute, against one of training


@dataclass(frozen=True)
class Price:
    """Seconds of one configuration: once, per step, per look at the validation sample, and to confirm that outputs
    stayed as they are."""

    once: float
    step: float
    look: float
    confirm: float = 0.0

    def seconds(self, steps: int, looks: int) -> float:
        return self.once + steps * self.step + looks * self.look

    def steps(self, seconds: float, looks: int) -> int:
        """How many the seconds pay for (0 or less: none)."""
        return int((seconds - self.once - looks * self.look) / self.step + 1e-6)  # rounding must not cost a step

    def exchange(self, how: How | Literal[""]) -> float:
        """Of handing over to this configuration: outputs before and after (the backbone's own are known), and
        distillation where it is needed. "": nothing is handed over."""
        if not how:
            return 0.0
        if exact(how):
            return self.confirm
        return self.look if how == "fresh" else 2 * self.look + DISTILL_STEPS * SLOWER * self.step


def prices(
    configurations: Sequence[dict[str, Any]],
    profile: Profile,
    speed: Speed,
    trials: Sequence[Trial],
    profiles: Mapping[tuple[str, str], Profile],
) -> list[Price]:
    """Without the scoring of the test split, which costs all alike."""
    untested = replace(profile, features=profile.features | {"test_examples": 0})
    validated = max(1.0, profile.features["validation_examples"])
    share = 2 * min(CONFIRMED, validated) / min(SAMPLE, validated)  # of a look
    corrected = costs.corrected(configurations, profile, speed, FEW, trials, profiles)
    found = []
    for configuration, whole in zip(configurations, corrected, strict=True):
        factor = whole.seconds / costs.cost(configuration, profile, speed, FEW).seconds

        def seconds(steps: int, evaluations: int, c: dict[str, Any] = configuration, f: float = factor) -> float:
            return f * costs.cost(c | {"evaluations": evaluations}, untested, speed, steps).seconds

        step = (seconds(MANY, 1) - seconds(FEW, 1)) / (MANY - FEW)
        look = seconds(FEW, 2) - seconds(FEW, 1)
        found.append(Price(max(0.0, seconds(FEW, 1) - FEW * step - look), step, look, share * look))
    return found
