"""Gain: what tuning makes of the room that the untuned backbone leaves, so that easy and hard tasks can be compared."""

from __future__ import annotations

import numpy as np

FLOOR = 0.05  # of a range: keeps gains finite where the backbone is nearly perfect already (or nearly always wrong)


def gain(score: float, untuned: float) -> float:
    """The share of the untuned backbone's errors that are gone, or (below 0) of its hits that are lost; in [-1, 1]."""
    change = score - untuned
    return min(1.0, max(-1.0, change / room(untuned, change >= 0)))


def room(untuned: float, up: bool = True) -> float:
    """How much score there is to win, or to lose."""
    return max(FLOOR, 1 - untuned if up else untuned)


def score(gains: np.ndarray, untuned: np.ndarray | float) -> np.ndarray:
    """The inverse of `gain`, in [0, 1]."""
    untuned = np.asarray(untuned)
    up = np.clip(gains, 0, 1) * np.maximum(FLOOR, 1 - untuned)
    down = np.clip(-gains, 0, 1) * np.maximum(FLOOR, untuned)
    clipped: np.ndarray = np.clip(untuned + up - down, 0, 1)
    return clipped
