"""A task's measured characteristics and its embedding: `profile(task, backbone) -> Profile`."""

from metapeft.profiling.profiles import Profile, every_profile, profile

__all__ = ["Profile", "every_profile", "profile"]
