"""Starts compute what the adapters did that they came from; sums of adapters are sums of what they change."""

from __future__ import annotations

import numpy as np
import pytest
from mlx.utils import tree_map

from metapeft.errors import UserError
from metapeft.fewshot import starts
from metapeft.peft import adapters
from metapeft.peft.saved import ROOT, Saved
from metapeft.runtime import mx
from metapeft.training.evaluation import predict
from metapeft.training.session import Session
from tests.training import made


@pytest.fixture(scope="module")
def at() -> Session:
    return made.session()


def losses(at: Session, saved: Saved) -> np.ndarray:
    adapter = adapters.build(saved, at.model)
    adapter.attach(at.model)
    try:
        return predict(at, adapter, "test").loss_sum
    finally:
        adapter.detach(at.model)


def saved(at: Session, method: str, scale: float = 0.05, **values: object) -> Saved:
    adapter = made.moved(method, at, scale, **values)
    adapter.detach(at.model)
    return adapters.take(adapter, {})


@pytest.mark.parametrize("method", made.METHODS)
def test_a_start_computes_what_its_adapter_did(at: Session, method: str) -> None:
    before = saved(at, method)
    start = starts.start(before)
    assert start.config.method == starts.start_method(method)
    np.testing.assert_allclose(losses(at, start), losses(at, before), rtol=1e-3, atol=1e-3)
    assert {t.dtype for t in start.tensors.values()} == {mx.float32}


def change(saved: Saved) -> dict[str, np.ndarray]:
    return {path: b @ a for path, (b, a) in starts.factors(saved).items()}


def test_sums_of_matrices_are_exact_within_the_rank(at: Session) -> None:
    one, two = saved(at, "lora", rank=2, layers=2), saved(at, "adalora", scale=0.3)
    summed = starts.average([one, two], [0.75, -0.5])
    first, second, found = change(one), change(two), change(summed)
    assert found.keys() == second.keys() > first.keys()
    for path, value in found.items():
        expected = -0.5 * second[path] + (0.75 * first[path] if path in first else 0)
        np.testing.assert_allclose(value, expected, atol=1e-6)
    assert summed.config.rank == 5 and summed.config.layers == 0  # type: ignore[attr-defined]
    alone = starts.average([one], [1.0])
    np.testing.assert_allclose(losses(at, alone), losses(at, one), rtol=1e-3, atol=1e-3)


def test_a_lower_rank_is_the_nearest_of_that_rank(at: Session) -> None:
    whole = starts.factors(saved(at, "lora", rank=6))
    low = change(starts.from_factors(whole, rank=2))
    for path, (b, a) in whole.items():
        values = np.linalg.svd(b @ a, compute_uv=False)
        missed = np.linalg.norm(b @ a - low[path])
        assert missed == pytest.approx(np.sqrt((values[2:] ** 2).sum()), rel=1e-3, abs=1e-6)


def test_virtual_tokens_are_averaged_where_they_match(at: Session) -> None:
    one, two = saved(at, "prefix", tokens=3), saved(at, "prefix", 0.2, tokens=3)
    middle = starts.average([one, two], [0.5, 0.5]).tensors["prompt_embeddings"]
    expected = (one.tensors["prompt_embeddings"] + two.tensors["prompt_embeddings"]) / 2
    np.testing.assert_allclose(np.array(middle), np.array(expected), rtol=1e-5, atol=1e-6)
    for other in (saved(at, "prefix", tokens=4), saved(at, "prompt", tokens=3), saved(at, "lora")):
        with pytest.raises(UserError, match="only adapters of one method"):
            starts.average([one, other], [0.5, 0.5])


def test_the_matrices_of_a_start_share_their_size(at: Session) -> None:
    """Training moves both alike."""
    start = starts.average([saved(at, "lora", 0.3)], [1.0])
    for parts in start.modules().values():
        a, b = (float(mx.linalg.norm(parts[name])) for name in "AB")
        assert a == pytest.approx(b, rel=1e-3)
    assert tree_map(lambda v: v.shape, start.tensors) == tree_map(lambda v: v.shape, saved(at, "lora").tensors)


def test_more_ranks_than_a_module_is_wide(at: Session) -> None:
    random = np.random.default_rng(0)
    b, a = random.normal(size=(8, 20)), random.normal(size=(20, 12))
    found = starts.from_factors({"layer": (b, a)}, rank=20)
    left, right = (np.array(found.tensors[f"{ROOT}layer.lora_{name}.weight"]) for name in "BA")
    np.testing.assert_allclose(left @ right, b @ a, atol=1e-4)
