"""What this machine computes with, how fast that is, and what to fix."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from metapeft import blas
from metapeft.errors import MetapeftError
from metapeft.settings import home

SLOW_GFLOPS = 20.0  # the reference BLAS reaches 4-7 on any x86-64 core; OpenBLAS 50 and more on one
LITTLE_MEMORY_MB = 3000.0  # the packaged backbone trains within this
LITTLE_DISK_MB = 2000.0


@dataclass(frozen=True)
class Check:
    """One finding. `remedy` says what to do when `ok` is false."""

    name: str
    value: str
    ok: bool
    remedy: str = ""


def examine() -> list[Check]:
    """Look at everything that decides whether and how fast metapeft works here (a few seconds, measures the device).

    Never raises for what it finds: a check that fails says why.
    """
    return [_guarded(name, check) for name, check in CHECKS.items()]


def format(checks: list[Check]) -> str:
    """The checks as lines for people, the remedies at the end."""
    width = max(len(check.name) for check in checks)
    lines = [f"{'ok ' if check.ok else 'FIX'}  {check.name:<{width}}  {check.value}" for check in checks]
    wrong = [check for check in checks if not check.ok]
    lines += ["", *(f"{check.name}: {check.remedy}" for check in wrong)] if wrong else ["", "Nothing to fix."]
    return "\n".join(lines)


def matmul_gflops(size: int = 1536, repeats: int = 5) -> float:
    """Best GFLOP/s of a float32 product of two (size, size) matrices on MLX's default device, after a warm-up."""
    from metapeft.runtime import mx

    left, right = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(left, right)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mx.eval(left @ right)
        mx.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (ImportError, OSError, RuntimeError, MetapeftError) as error:
        return Check(name, "failed", False, str(error))


def _python() -> Check:
    value = f"{platform.python_version()} ({sys.executable})"
    ok = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Check("python", value, ok, "use Python 3.11, 3.12 or 3.13")


def _device() -> Check:
    from metapeft.runtime import describe

    found = describe()
    value = f"{found['device']} ({found['device_name']}), {found['cores']} cores, {found['platform']}"
    return Check("device", value, True)


def _blas() -> Check:
    opened = blas.open_fast()
    threads = f", {opened.threads} threads" if opened.threads else ""
    return Check("blas", f"{opened.name}{threads}", opened.fast, opened.remedy)


def _speed() -> Check:
    speed = matmul_gflops(512, 2)
    if speed > SLOW_GFLOPS:
        speed = matmul_gflops()
    remedy = (
        f"float32 products run below {SLOW_GFLOPS:.0f} GFLOP/s: see blas, and whether other programs use the machine"
    )
    return Check("speed", f"{speed:.0f} GFLOP/s (float32 matrix product)", speed > SLOW_GFLOPS, remedy)


def _compiler() -> Check:
    from metapeft.runtime import device

    found = shutil.which("g++")
    if device() != "cpu" or sys.platform == "darwin":
        return Check("compiler", found or "none (not needed on this device)", True)
    return Check(
        "compiler",
        found or "none",
        found is not None,
        "mx.compile silently runs un-fused without g++: install it (Debian: apt-get install g++)",
    )


def _memory() -> Check:
    from metapeft.runtime import free_memory_mb, total_memory_mb

    free = free_memory_mb()
    value = f"{free:,.0f} MB free of {total_memory_mb():,.0f} MB"
    return Check(
        "memory", value, free >= LITTLE_MEMORY_MB, f"close other programs: {LITTLE_MEMORY_MB:,.0f} MB are wanted"
    )


def _home() -> Check:
    """Writable is what can be written: permissions alone say little about mounts, quotas and root."""
    folder = home()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    remedy = f"make {folder} writable or set METAPEFT_HOME to a folder that is"
    if not existing.is_dir():
        return Check("home", f"{existing} is not a folder", False, remedy)
    probe = existing / f".metapeft-probe-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
    except OSError as error:
        return Check("home", f"{folder} ({error.strerror})", False, remedy)
    finally:
        with suppress(OSError):  # on a read-only file system
            probe.unlink(missing_ok=True)
    return Check("home", str(folder), True)


def _disk() -> Check:
    existing = home()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 2**20
    return Check(
        "disk", f"{free:,.0f} MB free", free >= LITTLE_DISK_MB, f"free {LITTLE_DISK_MB:,.0f} MB or set METAPEFT_HOME"
    )


def _backbone() -> Check:
    from metapeft.backbones import packaged, store
    from metapeft.settings import DEFAULT_BACKBONE

    whole = store.manifest(packaged.folder(DEFAULT_BACKBONE)) is not None
    return Check("backbone", f"{DEFAULT_BACKBONE}: {'ready' if whole else 'downloaded at first use (93 MB)'}", True)


def _kernels() -> Check:
    from metapeft.kernels.decoder import native
    from metapeft.runtime import device

    if device() != "cpu" or sys.platform == "darwin":
        return Check("kernels", "none (not needed on this device)", True)
    ok = native() is not None
    value = "native: Llama-like models train as one call per step" if ok else "none: training takes about twice as long"
    return Check("kernels", value, ok, "a C++ compiler and a fast BLAS are needed: see compiler and blas")


def _versions() -> Check:
    from metapeft.runtime import versions

    return Check("versions", ", ".join(f"{name} {version}" for name, version in versions().items()), True)


CHECKS: dict[str, Callable[[], Check]] = {
    "python": _python,
    "device": _device,
    "blas": _blas,
    "speed": _speed,
    "compiler": _compiler,
    "kernels": _kernels,
    "memory": _memory,
    "home": _home,
    "disk": _disk,
    "backbone": _backbone,
    "versions": _versions,
}
