"""A fast BLAS for MLX on Linux.

The `mlx-cpu` wheel links the reference BLAS (4-7 GFLOP/s on two cores). Its three undefined symbols, `cblas_sgemm`,
`cblas_dgemm` and `cblas_cgemm`, are looked up in the process's global scope first, so a library opened with RTLD_GLOBAL
**before** the first `import mlx.core` takes their place (ELF symbol interposition, see ld.so(8)). Sources, in order:

1. whatever the process already offers (LD_PRELOAD),
2. `METAPEFT_BLAS`, the path of a library,
3. the wheel `scipy-openblas32`, which exports only `scipy_`-prefixed names and so needs a forwarder of three functions,
   compiled once and cached per user,
4. Debian's `libopenblas.so.0`.

macOS uses Accelerate and Metal: nothing to do there. This module never imports MLX.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metapeft.errors import UserError
from metapeft.progress import say

FORWARDED = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
FORWARDER = Path(__file__).with_name("blas_forwarder.c")
COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")  # the last three compile C++
SYSTEM = "libopenblas.so.0"  # found by ld.so
REMEDY = "install scipy-openblas32 and a C++ compiler (Debian: apt-get install g++), or Debian's libopenblas0-pthread"


@dataclass(frozen=True)
class Blas:
    """The BLAS that MLX's CPU matrix products use. `threads` is 0 where it cannot be asked or set."""

    name: str
    path: str
    threads: int
    fast: bool
    remedy: str = ""  # what to do when it is not fast


_lock = threading.Lock()
_opened: Blas | None = None
_library: ctypes.CDLL | None = None  # the one that computes: its thread count can be set


def open_fast() -> Blas:
    """Open a fast BLAS, once per process, before MLX is imported; later calls return the same answer.

    Says so once on stderr, with the remedy, when only the reference BLAS is there. Raises UserError when
    `METAPEFT_BLAS` names something that is not a BLAS.
    """
    global _opened
    with _lock:
        if _opened is None:
            _opened = _open()
            if not _opened.fast:
                say(f"warning: MLX uses {_opened.name}, which is slow: {_opened.remedy}")
        return _opened


def set_threads(n: int) -> int:
    """Let each matrix product use `n` threads (several single-threaded streams beat one wide one on small products).

    Returns the count in force afterwards, 0 where the library has no such setting (macOS, reference BLAS).
    """
    if n < 1:
        raise ValueError(f"threads must be at least 1, not {n}")
    open_fast()
    if _library is None or (setter := _function(_library, "openblas_set_num_threads")) is None:
        return 0
    setter.argtypes = [ctypes.c_int]
    setter.restype = None
    setter(n)
    return _threads(_library)


def get_threads() -> int:
    """Threads that each matrix product uses now, 0 where the library cannot say."""
    open_fast()
    return _threads(_library) if _library is not None else 0


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, capped by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return cores


def compilers(plus: bool = False) -> list[list[str]]:
    """The commands of the compilers on this machine, that of $CC or $CXX (`ccache gcc`) first. plus: for C++."""
    named = os.environ.get("CXX" if plus else "CC", "").split()
    names = [named, *([name] for name in (COMPILERS[-3:] if plus else COMPILERS))]
    return [[found, *name[1:]] for name in names if name and (found := shutil.which(name[0]))]


def _open() -> Blas:
    global _library
    if sys.platform != "linux":
        return Blas("Accelerate" if sys.platform == "darwin" else "MLX's own", "", 0, True)
    offered = _offered()
    if offered is not None:
        _library = offered
        return _describe("already in the process", _where(offered, "cblas_sgemm"), offered)
    if "mlx.core" in sys.modules:
        reason = "mlx was imported before metapeft.runtime; import metapeft.runtime first"
        return Blas("reference BLAS", "", 0, False, reason)
    if named := os.environ.get("METAPEFT_BLAS"):
        try:
            _library = _expose(Path(named).expanduser())
        except (OSError, subprocess.SubprocessError) as error:
            problem = str(error).strip().splitlines()[-1]
            raise UserError(
                f"METAPEFT_BLAS={named} cannot be used ({problem}); give the path of an OpenBLAS library or unset it"
            ) from error
        return _describe("METAPEFT_BLAS", named, _library)
    problems = []
    for name, candidate in (("scipy-openblas32", _wheel()), ("system OpenBLAS", Path(SYSTEM))):
        if candidate is None:
            continue
        try:
            _library = _expose(candidate)
        except (OSError, subprocess.SubprocessError) as error:
            problems.append(f"{name}: {str(error).strip().splitlines()[-1]}")
            continue
        return _describe(name, str(candidate), _library)
    remedy = REMEDY + (f" ({'; '.join(problems)})" if problems else "")
    return Blas("reference BLAS", "", 0, False, remedy)


def _describe(source: str, path: str, library: ctypes.CDLL) -> Blas:
    asked = _function(library, "openblas_get_config")
    if asked is None:
        return Blas(source, path, 0, True)
    asked.restype = ctypes.c_char_p
    version = " ".join(asked().decode().split()[:2])
    if not os.environ.get("OPENBLAS_NUM_THREADS") and not os.environ.get("OMP_NUM_THREADS"):
        cores = usable_cores()
        if _threads(library) > cores and (setter := _function(library, "openblas_set_num_threads")) is not None:
            setter(ctypes.c_int(cores))  # OpenBLAS does not know of a container's CPU quota
    return Blas(f"{version} ({source})", path, _threads(library), True)


def _offered() -> ctypes.CDLL | None:
    """The process's global scope, if it has a `cblas_sgemm` that does not come from a reference BLAS."""
    scope = ctypes.CDLL(None)
    if _function(scope, "cblas_sgemm") is None:
        return None
    path = Path(_where(scope, "cblas_sgemm")).name
    return None if path.startswith(("libblas", "libcblas", "libgslcblas")) else scope


def _wheel() -> Path | None:
    try:
        files = importlib.metadata.files("scipy-openblas32") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.match("lib/libscipy_openblas*.so"))
    return next((path for path in found if path.exists()), None)


def _expose(path: Path) -> ctypes.CDLL:
    """Put the library's matrix products into the global scope; returns the library that computes."""
    library = ctypes.CDLL(str(path))  # local: only the three functions become global
    if _function(library, "cblas_sgemm", prefixes=("",)) is not None:
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    prefixed = [_function(library, name, prefixes=("scipy_",)) for name in FORWARDED]
    pointers = [ctypes.cast(function, ctypes.c_void_p) for function in prefixed if function is not None]
    if len(pointers) < len(FORWARDED):
        raise OSError(f"{path} has no cblas_sgemm")
    # It is given addresses at run time: one file serves every version of the library it forwards to.
    forwarder = compiled(FORWARDER, mode=ctypes.RTLD_GLOBAL)
    forwarder.metapeft_forward_to.argtypes = [ctypes.c_void_p] * len(pointers)
    forwarder.metapeft_forward_to(*pointers)
    return library


def address(name: str) -> int | None:
    """Where the fast BLAS has this function; None without one."""
    open_fast()
    function = None if _library is None else _function(_library, name)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def compiled(source: Path, flags: Sequence[str] = ("-O2",), mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL:
    """The library that a source file of ours compiles to, from the per-user cache or compiled now (seconds).

    Raises OSError without a compiler that compiles it.
    """
    headers = [header.read_text(encoding="utf-8") for header in sorted(source.parent.glob("*.h"))]
    prefix = f"{source.stem}-{platform.machine()}-{_digest(source, *headers, *flags, _processor())}"
    folder = _cache_folder()
    if folder is None:  # nowhere to keep it: compile for this process alone
        with tempfile.TemporaryDirectory(prefix="metapeft-native-") as private:
            return ctypes.CDLL(str(_compile(source, flags, Path(private), prefix)), mode)
    for kept in folder.glob(f"{prefix}-*.so"):
        if kept.stem.endswith(_digest(kept)):  # opening a library that was cut short kills the process
            return ctypes.CDLL(str(kept), mode)
    return ctypes.CDLL(str(_compile(source, flags, folder, prefix)), mode)


def _digest(file: Path, *more: str) -> str:
    return hashlib.sha256(b"\0".join([file.read_bytes(), *(text.encode() for text in more)])).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache_folder() -> Path | None:
    """A folder that only this user can write to: nobody else can plant a library in it. None if there is none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):  # nobody's home
        return None
    folder = Path(base, "metapeft", "blas")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
    except OSError:
        return None
    private = state.st_uid == os.getuid() and not state.st_mode & 0o022
    return folder if private and os.access(folder, os.W_OK | os.X_OK) else None


def _compile(source: Path, flags: Sequence[str], folder: Path, prefix: str) -> Path:
    """Compile, then rename the result after its content: two processes at once end with the same file."""
    commands = compilers(source.suffix == ".cpp")
    if not commands:
        raise OSError("no C compiler" if source.suffix == ".c" else "no C++ compiler")
    handle, temporary = tempfile.mkstemp(prefix=".compiled-", suffix=".so", dir=folder)
    os.close(handle)
    try:
        problem = OSError()
        for command in commands:
            command += [*flags, "-shared", "-fPIC", "-o", temporary, str(source)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            except subprocess.SubprocessError as error:
                raise OSError(str(error)) from error
            if not done.returncode:
                break
            problem = OSError(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        else:
            raise problem
        target = folder / f"{prefix}-{_digest(Path(temporary))}.so"
        os.replace(temporary, target)
        return target
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _function(library: ctypes.CDLL, name: str, prefixes: tuple[str, ...] = ("", "scipy_")) -> Any | None:
    for prefix in prefixes:
        try:
            return library[prefix + name]  # a fresh object each time: no shared argtypes
        except AttributeError:
            continue
    return None


def _threads(library: ctypes.CDLL) -> int:
    asked = _function(library, "openblas_get_num_threads")
    return int(asked()) if asked is not None else 0


class _Found(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _where(library: ctypes.CDLL, name: str) -> str:
    """The file that the library's symbol comes from (dladdr(3)); empty if unknown."""
    found = _Found()
    lookup = getattr(ctypes.CDLL(None), "dladdr", None)
    if lookup is None or not lookup(ctypes.cast(library[name], ctypes.c_void_p), ctypes.byref(found)):
        return ""
    return os.fsdecode(found.file or b"")
