"""What writing a file of ours has in common everywhere."""

from __future__ import annotations

import secrets
from pathlib import Path


def clear(path: Path) -> None:
    """Moves away a folder that is where a file of ours belongs: it would be in the way for ever."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.unknown"))
