"""What a command can fail with. The command line turns these into one line on stderr and an exit code."""

from __future__ import annotations

import errno


class MetapeftError(Exception):
    """A failure that is not the user's mistake (exit code 1)."""

    exit_code = 1


class UserError(MetapeftError):
    """Bad input. The message is one sentence: what is wrong, where, and how to fix it (exit code 2)."""

    exit_code = 2


class Unfit(UserError):
    """A configuration that this backbone or these rows cannot take. Another one may do, so a search goes on."""


FULL, CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EROFS, errno.EACCES, errno.EPERM)
DATABASE_FULL, DATABASE_CLOSED = ("disk is full",), ("readonly database", "unable to open database", "disk i/o error")


def disk(error: BaseException | None) -> str | None:
    """What a full, closed or blocked disk means to a person, if that is at the bottom of a failure, whoever reported
    it."""
    if isinstance(error, NotADirectoryError | FileExistsError) and error.filename:
        return f"cannot make the folder {error.filename}: a file is in the way; move it, or set METAPEFT_HOME elsewhere"
    while error is not None:
        text = str(error).lower()
        number = error.errno if isinstance(error, OSError) else None
        where = error.filename if isinstance(error, OSError) and error.filename else ""
        place = f" at {where}" if where else ""
        if number in FULL or any(said in text for said in DATABASE_FULL) or "no space left" in text:
            return f"the disk is full{place}; free some space and run the command again, which goes on where it stopped"
        if number in CLOSED or any(said in text for said in DATABASE_CLOSED) or "read-only file system" in text:
            remedy = "set METAPEFT_HOME and --work to folders you may write in"
            return f"cannot write{place} (read-only, or not yours); {remedy}"
        error = error.__cause__ or error.__context__
    return None
