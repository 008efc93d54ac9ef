"""Ways in which a file can be broken."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path


def _garbage(data: bytes) -> bytes:
    return random.Random(len(data)).randbytes(len(data))


def _flipped(data: bytes) -> bytes:
    """One bit in the middle."""
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :] if data else b"\0"


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "first byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-2],
    "zeros": lambda data: bytes(len(data)),
    "garbage": _garbage,
    "a flipped bit": _flipped,
    "not UTF-8": lambda data: data[: len(data) // 2] + b"\xff\xfe" + data[len(data) // 2 :],
    "null": lambda data: b"null\n",
    "a list": lambda data: b"[1]\n",
    "empty object": lambda data: b"{}\n",
    "nested too deep": lambda data: b"[" * 200_000,
    "twice": lambda data: data + data,
}
NAMES = (*BYTES, "missing", "a folder")


def damage(path: Path, how: str) -> None:
    """Breaks one file."""
    data = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(BYTES[how](data))


def restore(path: Path, data: bytes) -> None:
    """Puts the file back, whatever took its place."""
    if path.is_dir():
        shutil.rmtree(path)
    path.write_bytes(data)
