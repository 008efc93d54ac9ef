"""What a command can fail with. The command line turns these into one line on stderr and an exit code."""

from __future__ import annotations


class MetapeftError(Exception):
    """A failure that is not the user's mistake (exit code 1)."""

    exit_code = 1


class UserError(MetapeftError):
    """Bad input. The message is one sentence: what is wrong, where, and how to fix it (exit code 2)."""

    exit_code = 2
