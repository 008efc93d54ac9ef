"""What a stranger's machine may lack, make says in one line; and the pins are fit for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("sh", "uname", "sed", "test", "touch", "dirname", "cat")


def make(tmp_path: Path, tools: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` in a copy of the house, on a machine that has only `tools` (name -> shell script or path)."""
    make_program = shutil.which("make")
    if make_program is None:
        pytest.skip("make is not installed")
    path = tmp_path / "bin"
    path.mkdir(exist_ok=True)
    for name in TOOLS:
        (path / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    for name, script in tools.items():
        (path / name).write_text(f"#!/bin/sh\n{script}\n")
        (path / name).chmod(0o755)
    house = tmp_path / "house"
    house.mkdir(exist_ok=True)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, house)
    environment = {"PATH": str(path), "HOME": str(tmp_path)}
    return subprocess.run([make_program, *arguments], cwd=house, env=environment, capture_output=True, text=True)


OLD = 'case "$*" in *"import venv"*) exit 0;; *) exit 1;; esac'  # a Python 3.9: sys.version_info is too small


@pytest.mark.parametrize(
    ("tools", "missing"),
    [
        ({}, "missing: Python 3.11, 3.12 or 3.13; Debian or Ubuntu: apt-get install python3 python3-venv"),
        ({"python3": OLD}, "missing: Python 3.11, 3.12 or 3.13"),
        (
            {"python3": 'case "$*" in *ensurepip*) exit 1;; esac'},
            "missing: the venv module of python3; Debian or Ubuntu: apt-get install python3-venv",
        ),
        ({"python3": "exit 0"}, "missing: a C++ compiler; Debian or Ubuntu: apt-get install g++"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, tools: dict[str, str], missing: str) -> None:
    if "C++" in missing and os.uname().sysname == "Darwin":
        pytest.skip("macOS needs no compiler")
    done = make(tmp_path, tools, "venv")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("missing")]
    assert len(lines) == 1 and lines[0].startswith(missing)
    assert not (tmp_path / "house" / ".venv").exists()


def test_an_old_python3_gives_way_to_a_newer_one_beside_it(tmp_path: Path) -> None:
    done = make(tmp_path, {"python3": OLD, "python3.12": "exit 0", "g++": ""}, "--dry-run", "venv")
    assert "python3.12" in done.stdout and "missing" not in done.stderr


def test_another_interpreter_can_be_named(tmp_path: Path) -> None:
    done = make(tmp_path, {"python3": "exit 0", "mine": "exit 0", "g++": ""}, "--dry-run", "venv", "PYTHON=mine")
    assert '"mine" -m venv' in done.stdout


def test_pins_are_names_versions_and_hashes() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    for line in text.splitlines():
        assert re.match(r"[a-z0-9._\[\],-]+==\S+( ;.*)? \\$|    --hash=sha256:[0-9a-f]{64}( \\)?$", line), line


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = set(re.findall(r"^([a-z0-9._-]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name is not None and name.group().lower() in pinned, requirement
