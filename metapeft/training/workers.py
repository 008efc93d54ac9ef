"""Threads that compute at the same time, each on an MLX stream of its own.

On a CPU all of MLX's work but its matrix products has one thread per stream, and one evaluation walks through its
streams one after another. So every core gets a Python thread with a stream, which builds and evaluates graphs of its
own while its products stay on its core. A GPU is kept busy by one stream: there, jobs run one after another on the
caller's thread.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

from metapeft import blas
from metapeft.runtime import device, mx

MOST = 8  # more parts of a batch would be too small for fast matrix products


class Workers:
    """`count` of them; `map` is all they do. `close` before the process ends: MLX aborts on streams left running."""

    def __init__(self, count: int):
        self.count = count
        self._building = threading.Lock()
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="metapeft", daemon=True) for _ in range(count)]
        if device() != "cpu":
            self._threads = []
        for thread in self._threads:
            thread.start()

    def map(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """What the jobs return, computed, in their order.

        A job builds arrays (or a list or tuple of them) from arrays that are computed already; one job builds at a
        time, so it may change the model while it does. It may return a function instead, which is called while others
        build or compute. On a CPU every product runs on one core: what a job computes does not depend on how many
        others there are.
        """
        if not self._threads:
            return _one_after_another(jobs)
        threads = blas.get_threads()
        blas.set_threads(1)
        try:
            futures: list[Future[Any]] = [Future() for _ in jobs]
            for job, future in zip(jobs, futures, strict=True):
                self._jobs.put((job, future))
            wait(futures)
            return [future.result() for future in futures]
        finally:
            if threads:
                blas.set_threads(threads)

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self) -> None:
        mx.set_default_stream(mx.new_stream(mx.cpu))
        while (item := self._jobs.get()) is not None:
            self._do(*item)
            del item  # or its arrays would live until the next job
        mx.clear_streams()

    def _do(self, job: Callable[[], Any], future: Future[Any]) -> None:
        try:
            with self._building:
                result = job()
            if callable(result):
                result = result()
            mx.eval(result)
            future.set_result(result)
        except BaseException as error:  # whoever waits for it raises it
            future.set_exception(error)


@lru_cache(maxsize=1)
def workers() -> Workers:
    """The process's workers: one per core on a CPU, one on a GPU."""
    found = Workers(min(blas.usable_cores(), MOST) if device() == "cpu" else 1)
    atexit.register(found.close)
    return found


def _one_after_another(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = []
    for job in jobs:
        result = job()
        if callable(result):
            result = result()
        mx.async_eval(result)  # while this computes, the next one is built
        if results:
            mx.eval(results[-1])
        results.append(result)
    mx.eval(results)
    return results
