from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metapeft import runtime
from metapeft.errors import UserError
from metapeft.runtime import Measured, mx, total_memory_mb

MB = 2**20


def test_measured_counts_wall_time_and_mlx_memory() -> None:
    """What was held before (also by other tests) and what the block took: 32 MB, three times at most."""
    held = mx.get_active_memory() / MB
    with Measured() as measured:
        time.sleep(0.05)
        mx.eval(mx.random.normal((32 * MB // 4,)) + 1)
    assert 0.05 <= measured.seconds < 30
    assert 31 <= measured.peak_memory_mb - held < 3 * 32 + 10


def test_measured_starts_from_what_is_held_not_from_an_earlier_peak() -> None:
    mx.eval(mx.random.normal((64 * MB // 4,)))
    with Measured() as measured:
        pass
    assert measured.peak_memory_mb * MB == pytest.approx(mx.get_active_memory(), abs=MB)


def test_measured_reports_a_block_that_fails() -> None:
    measured = Measured()
    with pytest.raises(KeyError), measured:
        mx.eval(mx.zeros((MB,)))
        raise KeyError
    assert measured.seconds > 0 and measured.peak_memory_mb >= 4


def test_memory_is_that_of_the_machine() -> None:
    total, free = runtime.total_memory_mb(), runtime.free_memory_mb()
    assert 0 < free <= total
    pages = runtime.os.sysconf("SC_PAGE_SIZE") * runtime.os.sysconf("SC_PHYS_PAGES") / MB
    assert total <= pages * 1.01


def test_require_memory() -> None:
    runtime.require_memory(1)
    with pytest.raises(MemoryError, match="out of memory"):
        runtime.require_memory(runtime.total_memory_mb())


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a cgroup v2 with 1 GiB, of which 700 MiB are used, 300 MiB of these by files it can drop."""
    (tmp_path / "memory.max").write_text(f"{1024 * MB}\n")
    (tmp_path / "memory.current").write_text(f"{700 * MB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {400 * MB}\ninactive_file {300 * MB}\n")
    monkeypatch.setattr(runtime, "CGROUP", tmp_path)
    assert runtime.total_memory_mb() == 1024
    assert runtime.free_memory_mb() == pytest.approx(624)
    (tmp_path / "memory.max").write_text("max\n")
    assert runtime.total_memory_mb() > 1024


def test_a_limit_of_ones_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    mx.clear_cache()  # of other tests: it counts as free
    held = runtime._proc("/proc/self/status", "VmRSS")
    monkeypatch.setenv("METAPEFT_MEMORY_MB", str(held + 500))
    assert runtime.total_memory_mb() == held + 500
    before = runtime.free_memory_mb()
    assert 300 < before < 700
    runtime.require_memory(100)
    with pytest.raises(MemoryError, match="out of memory"):
        runtime.require_memory(before + 1)
    kept = mx.random.normal((200 * MB // 4,))
    mx.eval(kept)
    assert runtime.free_memory_mb() < before - 150, "what this process holds counts against it"


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
def test_the_device_can_be_chosen(device: str) -> None:
    command = [sys.executable, "-c", "from metapeft import runtime; print(runtime.device())"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"METAPEFT_DEVICE": device})
    if device == "cpu" or (device == "gpu" and runtime.device() != "cpu"):
        assert done.stdout.strip() == ("cpu" if device == "cpu" else runtime.device()), done.stderr
    else:
        assert done.returncode and f"METAPEFT_DEVICE={'gpu' if device == 'gpu' else repr(device)}" in done.stderr


def test_describe_is_json_and_names_the_blas() -> None:
    found = json.loads(json.dumps(runtime.describe()))
    assert found["device"] == runtime.device() in ("cpu", "metal", "cuda")
    if found["device"] == "cpu" and sys.platform == "linux":
        assert found["fast_blas"] and "OpenBLAS" in found["blas"] and found["threads"] >= 1


def test_versions_are_the_installed_ones() -> None:
    found = runtime.versions()
    assert found["mlx"] == importlib.metadata.version("mlx")
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")


@pytest.mark.parametrize("text", ["lots", "-5", "nan"])
def test_a_limit_that_is_no_number_is_a_mistake(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("METAPEFT_MEMORY_MB", text)
    with pytest.raises(UserError, match=f"METAPEFT_MEMORY_MB={text} is no number of MiB"):
        total_memory_mb()
