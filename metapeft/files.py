"""What writing a file of ours has in common everywhere."""

from __future__ import annotations

import errno
import math
import os
import secrets
from pathlib import Path
from typing import Any


def clear(path: Path) -> None:
    """Moves away a folder that is where a file of ours belongs: it would be in the way for ever."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.unknown"))


def add_line(path: Path, line: bytes, mode: int = 0o644) -> None:
    """Appends a line that is on disk when this returns; what a kill or a full disk cut short before it stays a line of
    its own. Raises OSError, also where only a part of it found room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
    try:
        data = b"\n" + line + b"\n"
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file)
    finally:
        os.close(file)


def finite(value: Any) -> Any:
    """A JSON value without NaN and infinities, which JSON does not have: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
