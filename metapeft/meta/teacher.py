"""The token-level loss as a second, less noisy measurement of what the score measures.

Within one task, gains lie near a straight line in the logarithm of the loss. Where they do, the line says more about a
configuration than its own hits on a few hundred examples: gain and line are averaged by how uncertain each is. The line
of a configuration is fitted without it, so what is averaged are two measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from metapeft.meta.evidence import Known, Observation

LEAST = 6  # configurations with a loss on one task
SHARE = 0.7  # of a score's standard error that is not common to all configurations of the task
DOUBT = 0.5  # the line is never trusted beyond this share of the score's own error


def taught(observations: Sequence[Observation]) -> list[Observation]:
    """Observations with gain and error after the loss has been heard; scores stay as measured. The same order."""
    groups: dict[tuple[Known, int, str], list[int]] = {}
    for i, o in enumerate(observations):
        if math.isfinite(o.loss) and o.loss > 0 and o.status == "ok":
            groups.setdefault((o.task, o.steps, o.device), []).append(i)
    found = list(observations)
    for members in groups.values():
        if len(members) >= LEAST:
            for i, taught_one in zip(members, _one_task([observations[i] for i in members]), strict=True):
                found[i] = taught_one
    return found


def _one_task(group: list[Observation]) -> list[Observation]:
    gains = np.array([o.gain for o in group])
    losses = np.log([o.loss for o in group])
    if np.ptp(losses) < 1e-6:
        return group
    design = np.column_stack([np.ones(len(group)), losses])
    hat = design @ np.linalg.pinv(design)
    lever = np.clip(np.diag(hat), 0, 0.95)
    left = (gains - hat @ gains) / (1 - lever)  # residuals from a line without the point itself
    own = (SHARE * np.array([max(o.error, 1e-3) for o in group])) ** 2
    misfit = max(float(np.mean(left**2)) - float(own.mean()), 0.0)
    line = misfit / (1 - lever) + (DOUBT**2) * own
    weight = own / (own + line)
    result = []
    for o, w, residual in zip(group, weight, left, strict=True):
        result.append(replace(o, gain=float(o.gain - w * residual), error=o.error * math.sqrt(1 - float(w))))
    return result
