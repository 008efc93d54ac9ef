from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metapeft import blas, doctor
from metapeft.doctor import Check, examine

ROOT = Path(__file__).resolve().parent.parent


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine() -> None:
    found = by_name(examine())
    assert list(found) == list(doctor.CHECKS)
    assert found["blas"].ok and found["python"].ok and found["home"].ok
    assert all(check.remedy for check in found.values() if not check.ok)
    assert "mlx " in found["versions"].value and "GFLOP/s" in found["speed"].value


def test_people_read_the_remedies_last() -> None:
    text = doctor.format([Check("blas", "slow", False, "install it"), Check("device", "cpu", True)])
    assert text.splitlines() == ["FIX  blas    slow", "ok   device  cpu", "", "blas: install it"]
    assert doctor.format([Check("device", "cpu", True)]).endswith("Nothing to fix.")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS uses Accelerate")
def test_the_reference_blas_is_measured_and_named() -> None:
    code = "import mlx.core\nfrom metapeft import doctor\nprint(doctor.format(doctor.examine()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    lines = out.splitlines()
    assert any(line.startswith("FIX  blas") for line in lines)
    assert any(line.startswith("FIX  speed") for line in lines), "the reference BLAS must be seen to be slow"
    assert any(line.startswith("blas: ") and "import metapeft.runtime first" in line for line in lines)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    check = doctor._compiler()
    assert not check.ok and "apt-get install g++" in check.remedy


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "file" / "home"))
    check = doctor._home()
    assert not check.ok and "METAPEFT_HOME" in check.remedy
    monkeypatch.setenv("METAPEFT_HOME", "/proc/home")
    assert not doctor._home().ok


def test_the_first_use_says_what_it_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path))
    assert "downloaded at first use (93 MB)" in doctor._backbone().value


def test_looking_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "new"))
    assert doctor._home().ok
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise OSError("the disk has gone")

    monkeypatch.setitem(doctor.CHECKS, "disk", broken)
    check = by_name(examine())["disk"]
    assert not check.ok and check.remedy == "the disk has gone"


def test_speed_is_arithmetic_over_time() -> None:
    """Twice the threads or the same: never a number that one core of this kind could not do."""
    if sys.platform == "linux":
        before = blas.get_threads()
        blas.set_threads(1)
        try:
            one = doctor.matmul_gflops(512, 3)
        finally:
            blas.set_threads(before)
        assert 5 < one < 1000
