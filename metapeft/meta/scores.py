"""Measures of predictions: how good a choice was, and how true a stated uncertainty."""

from __future__ import annotations

import numpy as np

BINS = 10


def crps(draws: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score, (n,), of draws (draws, n): E|X - y| - E|X - X'| / 2 (Gneiting and Raftery
    2007)."""
    ordered = np.sort(draws, axis=0)
    n = len(draws)
    ranks = (2 * np.arange(1, n + 1) - n - 1)[:, None]
    found: np.ndarray = np.abs(draws - seen).mean(axis=0) - (ranks * ordered).sum(axis=0) / n**2
    return found


def nll(draws: np.ndarray, seen: np.ndarray, resolution: np.ndarray) -> np.ndarray:
    """Negative log density, (n,), of what was seen under a kernel density of the draws (bandwidth: Silverman 1986,
    and at least `resolution`, the step between the scores that a test split can have)."""
    spread = draws.std(axis=0)
    width = np.maximum(1.06 * spread * len(draws) ** -0.2, resolution)
    density = np.exp(-0.5 * ((seen - draws) / width) ** 2).mean(axis=0) / (width * np.sqrt(2 * np.pi))
    found: np.ndarray = -np.log(np.maximum(density, 1e-6))
    return found


def brier(chances: np.ndarray, happened: np.ndarray) -> float:
    return float(np.mean((chances - happened) ** 2))


def reliability(chances: np.ndarray, happened: np.ndarray) -> list[dict[str, float]]:
    """Per bin of equal width: mean chance, share that happened, how many."""
    place = np.minimum((chances * BINS).astype(int), BINS - 1)
    return [
        {
            "chance": float(chances[place == b].mean()),
            "share": float(happened[place == b].mean()),
            "n": int((place == b).sum()),
        }
        for b in range(BINS)
        if (place == b).any()
    ]


def ece(chances: np.ndarray, happened: np.ndarray) -> float:
    """Expected calibration error: the mean distance between chance and share over bins, by how many are in each."""
    rows = reliability(chances, happened)
    return sum(r["n"] * abs(r["chance"] - r["share"]) for r in rows) / sum(r["n"] for r in rows)


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank; 0 when one side is constant."""
    a, b = _ranks(left), _ranks(right)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return found
