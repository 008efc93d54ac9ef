"""Stacks: the sum of low-rank changes, frozen virtual tokens, and the one folder that holds both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metapeft.errors import UserError
from metapeft.peft import adapters, checkpoints, create, parse
from metapeft.peft.base import METHODS, Adapter
from metapeft.peft.lora import MatrixAdapter
from metapeft.peft.stack import Stack, as_prefix, joined, summed
from metapeft.runtime import mx, nn
from metapeft.serving import mixed
from metapeft.training import native
from metapeft.training.evaluation import predict
from metapeft.training.session import Session
from tests.training import made

MATRICES = ("lora", "adalora")
VIRTUAL = ("prompt", "prefix", "p_tuning")


@pytest.fixture(scope="module")
def session() -> Session:
    return made.session()


def trained(method: str, at: Session, scale: float = 0.05) -> Adapter:
    """Not at its start, and not attached."""
    adapter = made.moved(method, at, scale)
    adapter.detach(at.model)
    return adapter


def fresh(method: str, at: Session) -> Adapter:
    return create(parse(method, made.SMALL.get(method, {})), at.model, seed=3, text_ids=[5, 6, 7, 8])


def losses(session: Session, adapter: Adapter | None) -> np.ndarray:
    if adapter is None:
        return predict(session, None, "validation").loss_sum
    adapter.attach(session.model)
    try:
        return predict(session, adapter, "validation").loss_sum
    finally:
        adapter.detach(session.model)


def weights(model: nn.Module) -> list[int]:
    return [id(module) for _, module in model.named_modules()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_frozen_beneath_computes_as_before(method: str, quantized: bool) -> None:
    at = made.session(quantized=quantized)
    below = trained(method, at)
    before, expected = weights(at.model), losses(at, below)
    with at.over(below) as upper:
        np.testing.assert_allclose(losses(upper, None), expected, rtol=1e-4)
    assert weights(at.model) == before
    assert np.abs(losses(at, None) - expected).max() > 1e-2  # it does change something


@pytest.mark.parametrize("below", METHODS)
@pytest.mark.parametrize("top", MATRICES)
def test_a_fresh_matrix_method_on_anything_is_an_identity(session: Session, below: str, top: str) -> None:
    old = trained(below, session)
    expected = losses(session, old)
    with session.over(old) as upper:
        np.testing.assert_allclose(losses(upper, fresh(top, upper)), expected, rtol=1e-5)


@pytest.mark.parametrize("below", METHODS)
@pytest.mark.parametrize("top", METHODS)
def test_joined_is_what_was_trained_and_survives_a_folder(
    session: Session, below: str, top: str, tmp_path: Path
) -> None:
    old = trained(below, session)
    if below in VIRTUAL and top in VIRTUAL:
        with pytest.raises(UserError, match="virtual tokens"):
            joined(old, trained(top, session), session.model)
        return
    with session.over(old) as upper:
        new = trained(top, upper, 0.03)
        expected = losses(upper, new)
    both = joined(old, new, session.model)
    np.testing.assert_allclose(losses(session, both), expected, rtol=1e-4)
    adapters.save(both, tmp_path / "both", {"note": "kept"})
    loaded = adapters.load(tmp_path / "both", session.model)
    np.testing.assert_allclose(losses(session, loaded), expected, rtol=1e-4)
    assert checkpoints.read(tmp_path / "both").metadata == {"note": "kept"}
    assert isinstance(loaded, MatrixAdapter if below in MATRICES and top in MATRICES else Stack)


def test_a_stack_of_stacks_is_a_stack(session: Session) -> None:
    first, second, third = trained("lora", session), trained("prefix", session, 0.02), trained("adalora", session)
    two = joined(first, second, session.model)
    with session.over(two) as upper:
        expected = losses(upper, third)
    three = joined(two, third, session.model)
    assert isinstance(three, Stack)
    np.testing.assert_allclose(losses(session, three), expected, rtol=1e-4)


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_are_a_prefix(session: Session, method: str) -> None:
    adapter = trained(method, session)
    np.testing.assert_allclose(losses(session, as_prefix(adapter, session.model)), losses(session, adapter), rtol=1e-4)


def test_a_sum_has_the_sum_of_the_ranks(session: Session) -> None:
    low, triplets = trained("lora", session), trained("adalora", session)
    assert isinstance(low, MatrixAdapter) and isinstance(triplets, MatrixAdapter)
    some = next(iter(triplets.deltas))
    triplets.deltas[some].e = triplets.deltas[some].e * mx.array([[1.0], [0.0], [1.0]])
    total = summed(low, triplets)
    assert {path: d.a.shape[0] for path, d in total.deltas.items()} == {
        path: 4 if path == some else 5 for path in low.deltas
    }
    for path, delta in total.deltas.items():
        expected = low.deltas[path].weight() + triplets.deltas[path].weight()
        np.testing.assert_allclose(np.array(delta.weight()), np.array(expected), atol=1e-6)


def test_other_formats_refuse_half_of_an_adapter(session: Session, tmp_path: Path) -> None:
    both = joined(trained("lora", session), trained("prompt", session), session.model)
    adapters.save(both, tmp_path / "both", {})
    for to in ("peft", "mlx-lm"):
        with pytest.raises(UserError, match="cannot hold this adapter: prompt on lora"):
            checkpoints.convert(tmp_path / "both", tmp_path / to, to)  # type: ignore[arg-type]
    checkpoints.convert(tmp_path / "both", tmp_path / "copy", "metapeft")
    np.testing.assert_allclose(
        losses(session, adapters.load(tmp_path / "copy", session.model)), losses(session, both), rtol=1e-5
    )


def test_a_stack_is_served(session: Session, tmp_path: Path) -> None:
    both = joined(trained("lora", session), trained("prefix", session), session.model)
    adapters.save(both, tmp_path / "both", {})
    found = mixed.read(tmp_path / "both", session.model, "both")
    both.attach(session.model)
    prefix = both.prefix(session.model)
    both.detach(session.model)
    assert prefix is not None and found.prefix is not None and found.matrices
    np.testing.assert_allclose(np.array(found.prefix[-1][0]), np.array(prefix[-1][0]), rtol=1e-5)


def test_gradients_on_a_frozen_prefix_are_those_of_mlx(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on top of something frozen: the native decoder and MLX end alike."""
    if native.usable(session, None) is None:
        pytest.skip("no native decoder here")
    from metapeft.training.trainer import run_trial

    configuration = {"method": "lora", "rank": 2, "learning_rate": 0.01}
    for below in ("prefix", "lora"):
        with session.over(trained(below, session)) as upper:
            fast = run_trial(upper, configuration, steps=4, test=False)
            upper.decoder = None
            slow = run_trial(upper, configuration, steps=4, test=False)
        for one, other in zip(fast.curve, slow.curve, strict=True):
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
            assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-3)


def test_the_trunk_below_a_top_adapter_knows_what_is_merged_there(session: Session) -> None:
    old, top = trained("lora", session), fresh("lora", session)
    assert isinstance(top, MatrixAdapter)
    upper_half = MatrixAdapter(top.config, {p: d for p, d in top.deltas.items() if ".3." in p})
    assert upper_half.lowest_layer() == 3
    with session.over(old) as upper:
        assert upper.start(upper_half) == 3
        np.testing.assert_allclose(losses(upper, upper_half), losses(made.session(), old), rtol=1e-4)
    virtual = trained("prompt", session)
    with session.over(virtual) as upper:
        assert upper.start(upper_half) == 0  # a frozen prefix reaches every layer
