"""Files of ours: a line is there whole when it is said to be there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from metapeft.files import add_line

FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"


def test_what_was_cut_short_before_stays_apart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    add_line(path, b"one", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes() + b"hal")
    add_line(path, b"two")
    assert [line for line in path.read_bytes().split(b"\n") if line] == [b"one", b"hal", b"two"]


@pytest.mark.parametrize("room", [3, 20])
def test_a_line_that_found_room_for_a_part_only_is_an_error(room: int, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    code = f"from pathlib import Path; from metapeft.files import add_line; add_line(Path({str(path)!r}), b'x' * 40)"
    ran = subprocess.run([sys.executable, "-c", FULL.format(size=room) + code], capture_output=True, text=True)
    assert "No space left on device" in ran.stderr or "File too large" in ran.stderr


def test_feedback_that_was_not_kept_is_not_acknowledged(home: Path) -> None:
    """The disk ends within the second judgement: it is refused, and the first is there."""
    code = (
        "import os; from metapeft.monitoring import feedback; feedback.record('m@1', 'right', 'a');"
        "size = feedback.path().stat().st_size + 20; import resource;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); feedback.record('m@1', 'wrong', 'b')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1 and "UserError: cannot write" in ran.stderr
    from metapeft.monitoring import feedback

    assert [one.id for one in feedback.read()] == ["a"]
    assert json.loads(feedback.path().read_bytes().split(b"\n")[1])["id"] == "a"
