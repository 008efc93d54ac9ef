"""What to try next, and what came out best: spaces, sweeps, Pareto fronts."""

from metapeft.search.sweep import Limits, Sweep

__all__ = ["Limits", "Sweep"]
