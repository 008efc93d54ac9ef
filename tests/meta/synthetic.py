"""Experience with a known truth (benchmarks/synthetic.py, where the benchmarks make theirs too)."""

from __future__ import annotations

from benchmarks.synthetic import CONFIGURATIONS, World, world
from metapeft.meta.evidence import key

__all__ = ["CONFIGURATIONS", "World", "key_of", "world"]


def key_of(configuration: dict[str, object]) -> str:
    return key(configuration)
