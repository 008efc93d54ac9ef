"""The BLAS is opened once per process and before MLX, so most of these tests look at fresh processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from metapeft import blas
from metapeft.runtime import mx

ROOT = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS uses Accelerate")


def python(
    code: str, *, cache: Path | None = None, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; `cache` stands in for the user's cache folder."""
    environment = {**os.environ, **variables}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


OPEN = """
import contextlib, io, json
from dataclasses import asdict
from metapeft import blas
with contextlib.redirect_stderr(io.StringIO()) as said:
    first, second = blas.open_fast(), blas.open_fast()
print(json.dumps({**asdict(first), "same": first is second, "warnings": said.getvalue().splitlines()}))
"""


def opened(code: str = OPEN, **options: object) -> dict[str, object]:
    return json.loads(python(code, **options).stdout)  # type: ignore[arg-type]


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "metapeft" / "blas").iterdir())


@linux
def test_mlx_calls_the_fast_library_and_not_the_reference() -> None:
    """What the dynamic linker says it bound, with every symbol bound at load time (ld.so(8), LD_DEBUG)."""
    done = python("import metapeft.runtime", LD_DEBUG="bindings", LD_BIND_NOW="1")
    found = re.findall(r"binding file \S*libmlx\.so \[0\] to (\S+) \[0\]: normal symbol `(cblas_\w+)'", done.stderr)
    assert {symbol for _, symbol in found} == set(blas.FORWARDED)
    assert not any(Path(library).name.startswith("libblas") for library, _ in found), found


@linux
def test_products_equal_numpys() -> None:
    """float32 and complex64, plain and transposed operands, shapes that are no multiple of anything."""
    rng = np.random.default_rng(0)
    for kind in (np.float32, np.complex64):
        left, right = rng.normal(size=(37, 53)).astype(kind), rng.normal(size=(53, 29)).astype(kind)
        if kind is np.complex64:
            left, right = left + 1j * left[::-1], right - 2j * right
        np.testing.assert_allclose(np.array(mx.array(left) @ mx.array(right)), left @ right, rtol=1e-4, atol=1e-4)
        turned = mx.array(left.T.copy()).T @ mx.array(right.T.copy()).T
        np.testing.assert_allclose(np.array(turned), left @ right, rtol=1e-4, atol=1e-4)


def test_opening_is_lazy() -> None:
    """Airflow forks and parses: importing metapeft must open nothing."""
    code = """
    import sys, ctypes, metapeft.blas
    print("mlx.core" in sys.modules, metapeft.blas._opened)
    """
    assert python(code).stdout.split() == ["False", "None"]


@linux
def test_a_fork_after_opening_still_computes() -> None:
    code = """
    import os
    from metapeft import blas
    blas.open_fast()
    child = os.fork()
    if child == 0:
        from metapeft.runtime import mx
        ok = (mx.ones((300, 300)) @ mx.ones((300, 300)))[0, 0].item() == 300
        os._exit(0 if ok else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert python(code).stdout.strip() == "0"


@linux
def test_compiled_once_and_kept(tmp_path: Path) -> None:
    first = opened(cache=tmp_path)
    assert first["fast"] and first["same"] and first["warnings"] == []
    (library,) = kept(tmp_path)
    before = library.stat().st_mtime_ns
    assert opened(cache=tmp_path, PATH="")["fast"], "a second start needs no compiler"
    assert library.stat().st_mtime_ns == before


@linux
def test_two_first_starts_at_once_leave_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: opened(cache=tmp_path), range(4)))
    assert all(result["fast"] for result in results)
    assert len(kept(tmp_path)) == 1


@linux
@pytest.mark.parametrize("damage", ["", "not a library", "half"])
def test_a_damaged_cache_is_compiled_again(tmp_path: Path, damage: str) -> None:
    opened(cache=tmp_path)
    (library,) = kept(tmp_path)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2] if damage == "half" else bytes(damage, "ascii"))
    assert opened(cache=tmp_path)["fast"]
    assert kept(tmp_path) == [library] and len(library.read_bytes()) == len(whole)


@linux
def test_no_cache_folder_still_opens(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    assert opened(cache=file)["fast"]


@linux
def test_a_cache_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "metapeft" / "blas"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert opened(cache=tmp_path)["fast"]
    assert kept(tmp_path) == []


@linux
def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    code = "from metapeft import blas\nblas.SYSTEM = 'libnosuchblas.so.0'\n" + OPEN
    result = opened(code, cache=tmp_path, PATH="", CC="")
    assert not result["fast"]
    (warning,) = result["warnings"]  # type: ignore[misc]
    assert "no C compiler" in warning and "apt-get install g++" in warning


@linux
def test_a_compiler_may_be_a_command_and_another_one_follows(tmp_path: Path) -> None:
    for number, named in enumerate(("env gcc", "env false")):
        cache = tmp_path / str(number)
        cache.mkdir()
        result = opened(cache=cache, CC=named)
        assert result["fast"] and result["warnings"] == [] and len(kept(cache)) == 1


@linux
def test_without_a_home_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert blas._cache_folder() is None and list(tmp_path.iterdir()) == []


@linux
def test_too_late_after_mlx(tmp_path: Path) -> None:
    result = opened("import mlx.core\n" + OPEN)
    assert not result["fast"]
    assert result["warnings"] == [
        "warning: MLX uses reference BLAS, which is slow: "
        "mlx was imported before metapeft.runtime; import metapeft.runtime first"
    ]


@linux
def test_what_the_process_already_has_is_used(tmp_path: Path) -> None:
    """As with LD_PRELOAD: here the forwarder itself, compiled by a first start and preloaded in a second."""
    opened(cache=tmp_path)
    (library,) = kept(tmp_path)
    result = opened(cache=tmp_path / "other", LD_PRELOAD=str(library))
    assert result["fast"] and result["name"] == "already in the process" and result["path"] == str(library)
    assert not (tmp_path / "other").exists()


@linux
def test_a_named_library_is_used(tmp_path: Path) -> None:
    library = blas._wheel()
    assert library is not None
    result = opened(METAPEFT_BLAS=str(library))
    assert result["fast"] and "METAPEFT_BLAS" in str(result["name"]) and result["path"] == str(library)


@linux
@pytest.mark.parametrize("named", ["/nowhere/libblas.so", "text", "libm.so.6"])
def test_a_named_library_that_is_none_is_an_error(tmp_path: Path, named: str) -> None:
    if named == "text":
        (tmp_path / "text.so").write_text("hello")
        named = str(tmp_path / "text.so")
    done = python("from metapeft import blas\nblas.open_fast()", check=False, METAPEFT_BLAS=named)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("metapeft.errors.UserError: METAPEFT_BLAS=" + named) and "unset it" in last


@linux
def test_threads_can_be_set_and_single_threaded_streams_agree() -> None:
    rng = np.random.default_rng(1)
    left, right = (rng.normal(size=(200, 200)).astype(np.float32) for _ in range(2))
    before = blas.get_threads()
    try:
        assert blas.set_threads(1) == 1 == blas.get_threads()
        streams = [mx.new_stream(mx.cpu) for _ in range(3)]
        products = [mx.matmul(mx.array(left), mx.array(right), stream=stream) for stream in streams]
        mx.eval(products)
        for product in products:
            np.testing.assert_allclose(np.array(product), left @ right, rtol=1e-4, atol=1e-4)
    finally:
        blas.set_threads(before)
    with pytest.raises(ValueError, match="at least 1"):
        blas.set_threads(0)


def test_other_systems_need_nothing() -> None:
    code = "import sys\nsys.platform = 'darwin'\n" + OPEN
    result = opened(code)
    assert result["fast"] and result["name"] == "Accelerate" and result["warnings"] == []


def test_usable_cores_follow_the_affinity() -> None:
    assert 1 <= blas.usable_cores() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        code = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + OPEN
        assert python(code + "print(blas.usable_cores())").stdout.splitlines()[-1] == "1"
