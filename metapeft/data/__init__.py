"""Tasks: formats, the catalog of public ones, splits, validation and versions; `load_task` brings them together."""

from metapeft.data.load import load_task

__all__ = ["load_task"]
