"""One thread for numpy's linear algebra: on matrices of this size more threads only get into each other's way, and into
that of a training beside them (measured: a fit of 1 s takes 30 s with two threads on two busy cores)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Of the BLAS that numpy and scipy bring; the one that MLX computes with keeps its own."""
    import scipy.linalg  # noqa: F401  (its BLAS must be there to be found)
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController()
    theirs = [lib.filepath for lib in found.lib_controllers if "numpy" in lib.filepath or "scipy.libs" in lib.filepath]
    with found.select(filepath=theirs).limit(limits=1):
        yield
