"""What experience teaches: `recommend(task, profile, settings, experience) -> Recommendation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metapeft.meta.experience import Experience
    from metapeft.meta.recommendation import Recommendation, recommend

__all__ = ["Experience", "Recommendation", "recommend"]


def __getattr__(name: str) -> Any:  # recommending imports MLX, reading experience does not
    if name == "Experience":
        from metapeft.meta.experience import Experience

        return Experience
    if name in ("Recommendation", "recommend"):
        from importlib import import_module

        return getattr(import_module("metapeft.meta.recommendation"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
