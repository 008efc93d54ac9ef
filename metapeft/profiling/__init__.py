"""A task's measured characteristics and its embedding: `profile(task, backbone) -> Profile`."""

from metapeft.profiling.profiles import Profile, known_profiles, profile

__all__ = ["Profile", "known_profiles", "profile"]
