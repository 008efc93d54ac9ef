"""Jobs on threads give what they give alone, in their order."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest

from metapeft import blas
from metapeft.runtime import mx
from metapeft.training.workers import Workers


@pytest.fixture(params=[1, 2, 3])
def workers(request: pytest.FixtureRequest) -> object:
    found = Workers(request.param)
    yield found
    found.close()


def test_results_come_in_order_and_are_the_same_however_many_work(workers: Workers) -> None:
    x = mx.random.normal((50, 64), key=mx.random.key(0))
    w = mx.random.normal((64, 64), key=mx.random.key(1))
    mx.eval(x, w)

    def job(n: int) -> tuple[mx.array, list[mx.array]]:
        y = mx.softmax(x[: n + 1] @ w) @ w
        return y.sum(axis=-1), [y, mx.grad(lambda v: mx.tanh(v @ w).sum())(x)]

    found = workers.map([partial(job, n) for n in range(7)])
    threads = blas.get_threads()
    if workers.count > 1:
        blas.set_threads(1)
    for n, (total, (y, gradient)) in enumerate(found):
        expected, (same, slope) = job(n)
        assert np.array_equal(y, same) and np.array_equal(total, expected) and np.array_equal(gradient, slope)
    if threads:
        blas.set_threads(threads)


def test_an_error_reaches_the_caller_and_the_workers_go_on(workers: Workers) -> None:
    def fails() -> mx.array:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        workers.map([lambda: mx.array(1.0), fails, lambda: mx.array(2.0)])
    assert [v.item() for v in workers.map([lambda: mx.array(3.0), lambda: mx.array(4.0)])] == [3.0, 4.0]
    assert workers.map([]) == []


def test_one_job_builds_at_a_time(workers: Workers) -> None:
    inside, most = 0, 0
    counting = threading.Lock()

    def job() -> mx.array:
        nonlocal inside, most
        with counting:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(0.01)
        with counting:
            inside -= 1
        return mx.array(0.0)

    workers.map([job] * 6)
    assert most == 1


def test_the_number_of_blas_threads_is_given_back(workers: Workers) -> None:
    before = blas.get_threads()
    workers.map([lambda: mx.array(0.0)] * 2)
    assert blas.get_threads() == before


def test_results_that_nobody_holds_are_gone() -> None:
    found = Workers(2)
    try:
        before = mx.get_active_memory()
        results = found.map([lambda: mx.zeros((5_000_000,)) + 1] * 2)
        assert mx.get_active_memory() - before >= 40_000_000
        del results
        found.map([lambda: mx.array(1.0)] * 2)
        assert mx.get_active_memory() - before < 1_000_000
    finally:
        found.close()
