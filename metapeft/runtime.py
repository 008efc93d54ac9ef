"""The one door to MLX: `from metapeft.runtime import mx, nn, optim`.

Importing this module opens a fast BLAS first (`metapeft.blas`), then imports MLX. MLX work must not happen in a forked
child (`os.fork()` after any `mx.eval` hangs it): start `python -m …` or a spawned process.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
import time
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from metapeft import blas as _blas
from metapeft.errors import UserError
from metapeft.settings import allowed_memory_mb

BLAS = _blas.open_fast()  # before MLX: see metapeft.blas

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

__all__ = [
    "BLAS",
    "Measured",
    "describe",
    "device",
    "free_memory_mb",
    "mx",
    "nn",
    "optim",
    "require_memory",
    "total_memory_mb",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
    "versions",
]

MB = 1024 * 1024
CGROUP = Path("/sys/fs/cgroup")  # where a container's limits stand (cgroup v2)
DEVICE = "METAPEFT_DEVICE"  # cpu or gpu; unset: MLX's own choice
REPORTED = ("mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "optuna", "mlflow", "dvc", "apache-airflow")


def device() -> str:
    """Where MLX computes: "cpu", "metal" or "cuda"."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def describe() -> dict[str, Any]:
    """Device, its name, BLAS and threads: what a run says at its start and a trial records."""
    information = mx.device_info()
    return {
        "device": device(),
        "device_name": str(information.get("device_name", "")),
        "blas": BLAS.name if device() == "cpu" else "",
        "fast_blas": BLAS.fast,
        "threads": _blas.get_threads(),
        "cores": _blas.usable_cores(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": importlib.metadata.version("mlx"),
    }


@lru_cache(maxsize=1)
def processor() -> str:
    """What computes, in words: devices of one kind differ in speed."""
    about = describe()
    return ", ".join(filter(None, (about["device_name"], about["blas"], f"{about['cores']} cores")))


def versions() -> dict[str, str]:
    """Installed versions of Python, metapeft and the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for name in ("metapeft", *REPORTED):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def total_memory_mb() -> float:
    """Memory of the machine, or of its container, or METAPEFT_MEMORY_MB, whichever is least, in MiB."""
    own = allowed_memory_mb()
    if sys.platform == "darwin":
        return min(own, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / MB)
    limit = _cgroup("memory.max")
    return min(own, _proc("/proc/meminfo", "MemTotal"), limit if limit is not None else own)


def free_memory_mb() -> float:
    """Memory that a new run may take without swapping, in MiB (the GPU's own memory with CUDA)."""
    if device() == "cuda":
        return float(mx.get_memory_limit() - mx.get_active_memory()) / MB
    if sys.platform == "darwin":
        return min(_darwin_free_mb(), allowed_memory_mb() - mx.get_active_memory() / MB)
    free = _proc("/proc/meminfo", "MemAvailable")
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        reclaimable = _cgroup_reclaimable_mb()
        free = min(free, limit - used + reclaimable)
    if (own := allowed_memory_mb()) < math.inf:  # what MLX holds unused it will use first
        free = min(free, own - _proc("/proc/self/status", "VmRSS") + mx.get_cache_memory() / MB)
    return max(free, 0.0)


def require_memory(mb: float = 0.0) -> None:
    """Raise MemoryError unless `mb` MiB, and a reserve of 2 % of the machine's memory, are free.

    Ask before each step with what the step will take: on a CPU MLX enforces no limit and does not survive a failed
    allocation, so a run must stop before it swaps. Costs some 0.1 ms.
    """
    free, reserve = free_memory_mb(), 0.02 * total_memory_mb()
    if free < mb + reserve:
        raise MemoryError(f"{mb:,.0f} MB needed, {max(free - reserve, 0):,.0f} MB free: out of memory")


def _choose_device() -> None:
    """What METAPEFT_DEVICE asks for. Raises UserError when there is no such device."""
    wanted = os.environ.get(DEVICE)
    if wanted not in (None, "", "cpu", "gpu"):
        raise UserError(f"{DEVICE}={wanted!r} is no device; set it to cpu or gpu, or not at all")
    if wanted == "cpu":
        mx.set_default_device(mx.cpu)
    elif wanted == "gpu" and mx.default_device().type != mx.DeviceType.gpu:
        raise UserError(f"{DEVICE}=gpu, but MLX finds no GPU here; unset it, or see `metapeft doctor`")


def _limit_gpu() -> None:
    """METAPEFT_MEMORY_MB. Metal by default takes up to 1.5 times what the system recommends."""
    recommended = mx.device_info().get("max_recommended_working_set_size") if device() == "metal" else None
    own = allowed_memory_mb()
    limits = [int(recommended)] if recommended else []
    limits += [int(own * MB)] if own < math.inf else []
    if limits:
        mx.set_memory_limit(min(limits))


class Measured:
    """Context manager: wall seconds and MLX's peak memory (MiB) of the block.

    The peak counts everything MLX holds, so it includes the model. Blocks must not be nested: the peak is one counter.
    The block must evaluate its own work; MLX is lazy.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_memory_mb = 0.0

    def __enter__(self) -> Measured:
        mx.synchronize()
        mx.reset_peak_memory()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mx.synchronize()
        self.seconds = time.perf_counter() - self._start
        self.peak_memory_mb = max(mx.get_peak_memory(), mx.get_active_memory()) / MB


def _proc(file: str, field: str) -> float:
    """A field of /proc/meminfo or /proc/self/status, in MiB."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return float(line.split()[1]) / 1024
    return 0.0


def _cgroup(name: str) -> float | None:
    """A cgroup v2 number in MiB, None where there is no limit or no such cgroup."""
    try:
        text = (CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return float(text) / MB if text.isdigit() else None


def _cgroup_reclaimable_mb() -> float:
    """File pages that the kernel gives back before it kills anything."""
    try:
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("inactive_file ")) / MB
    except OSError:
        return 0.0


def _darwin_free_mb() -> float:
    """Free, inactive and speculative pages, as vm_stat(1) counts them."""
    import re
    import subprocess

    report = subprocess.run(["vm_stat"], capture_output=True, text=True, check=False).stdout
    size = re.search(r"page size of (\d+) bytes", report)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.", report, re.MULTILINE)
    if size is None or not pages:
        return total_memory_mb() / 2
    return sum(map(int, pages)) * int(size.group(1)) / MB


_choose_device()
if device() != "cpu":
    _limit_gpu()
