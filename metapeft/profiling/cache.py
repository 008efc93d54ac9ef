"""Measurements kept as JSON files in METAPEFT_HOME: whole or not there, whoever writes and whenever they die."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from metapeft.errors import UserError
from metapeft.files import clear


def read(path: Path) -> dict[str, Any] | None:
    """None when the file is not there or is damaged: what it held is measured again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # brackets nested thousands deep
        return None
    return record if isinstance(record, dict) else None


def write(path: Path, record: dict[str, Any]) -> None:
    """Raises UserError when METAPEFT_HOME cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        clear(path)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"cannot write {path} ({reason}); set METAPEFT_HOME to a folder you may write in") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
