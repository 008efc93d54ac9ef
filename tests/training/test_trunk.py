"""Hidden states computed once are the ones that the whole model computes, wherever and with whomever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from metapeft.backbones.forward import run
from metapeft.kernels.decoder import Decoder, Rows
from metapeft.runtime import device, mx, nn
from metapeft.training.session import Session, completion_logits
from metapeft.training.trunk import Room, Trunk
from metapeft.training.vector import Layout
from metapeft.training.workers import Workers
from tests.training import made


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3_moe"])
def session(request: pytest.FixtureRequest) -> Session:
    return made.session(request.param)


def fresh(session: Session, depth: int, **arguments: object) -> Trunk:
    arguments = {"decoder": session.decoder} | arguments
    return Trunk(session.model, depth, session.encoded["train"], session.shared, **arguments)


def test_it_is_the_input_of_its_layer(session: Session) -> None:
    trunk = fresh(session, 2)
    trunk.prepare(range(10), session.workers)
    for index in range(10):
        whole = (*session.shared, *session.encoded["train"][index].ids[:-1])
        expected = run(session.model, mx.array([whole]), stop=2, logits=False)[0, len(session.shared) :]
        assert np.allclose(trunk.get(index), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("memory", [None, 3000, 0])
def test_cached_loss_and_gradients_equal_uncached(session: Session, depth: int, memory: int | None) -> None:
    """In memory, partly and all on disk."""
    adapter = made.moved("lora", session, layers=session.depth - depth)
    assert adapter.lowest_layer() == depth
    layout = Layout(adapter.module.trainable_parameters())
    vector = layout.join(adapter.module.trainable_parameters())
    indices = [3, 11, 7]

    def loss(start: int) -> Callable[[mx.array], mx.array]:
        def of(vector: mx.array) -> mx.array:
            adapter.module.update(layout.split(vector))
            shard = session.shard("train", indices, start)
            logits = completion_logits(session.model, session.prefix(adapter, start), shard, start)
            return nn.losses.cross_entropy(logits, shard.targets, reduction="mean")

        return of

    value, gradient = mx.value_and_grad(loss(0))(vector)
    trunk = fresh(session, depth, room=None if memory is None else Room(memory))
    trunk.prepare(range(20), session.workers)
    assert (len(trunk._disk) > 0) == (memory is not None)
    assert (len(trunk._memory) > 0) == (memory != 0)
    session._trunks[("train", depth)] = trunk
    cached, cached_gradient = mx.value_and_grad(loss(depth))(vector)
    adapter.module.update(layout.split(vector))
    adapter.detach(session.model)
    session._trunks.clear()
    assert abs(value.item() - cached.item()) < 1e-5
    assert np.abs(np.array(gradient)).max() > 1e-3
    assert np.allclose(gradient, cached_gradient, atol=1e-5)


@pytest.mark.skipif(device() != "cpu", reason="on a GPU rounding may depend on the shape of the batch")
def test_states_do_not_depend_on_company_workers_room_or_a_lower_trunk(session: Session) -> None:
    every = range(40)
    one, three = Workers(1), Workers(3)
    together, alone, few = fresh(session, 3), fresh(session, 3), fresh(session, 3, room=Room(1000))
    together.prepare(every, session.workers)
    few.prepare(every, three)
    for index in every:
        alone.prepare([index], one)
    lower = fresh(session, 1)
    lower.prepare(range(0, 40, 2), session.workers)
    higher = fresh(session, 3, lower=lower)
    higher.prepare(every, session.workers)
    # The native decoder gives the same bits; a BLAS may have other kernels for few rows, which round otherwise.
    least = 0.0 if session.decoder is not None else 1e-4
    for index in every:
        for other in (alone, few, higher):
            assert np.allclose(together.get(index), other.get(index), rtol=least, atol=least)
    three.close()


def test_workers_that_read_from_disk_at_once_read_their_own_rows(session: Session) -> None:
    """A trunk above one on disk has the bits of one above the same states in memory: the batches are the same."""
    workers = Workers(4)
    found = []
    for lower in (fresh(session, 1), fresh(session, 1, room=Room(0))):
        lower.prepare(range(40), workers)
        for _ in range(20):
            found.append(fresh(session, 3, lower=lower))
            found[-1].prepare(range(40), workers)
    workers.close()
    for other in found[1:]:
        assert all(np.array_equal(found[0].get(index), other.get(index)) for index in range(40))


def test_a_session_goes_on_from_a_shallower_trunk(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def counted(*arguments: object, **named: object) -> mx.array:
        starts.append(named.get("start", 0))
        return run(*arguments, **named)  # type: ignore[arg-type]

    session.trunk("train", 1).prepare(range(5), session.workers)
    monkeypatch.setattr("metapeft.training.trunk.run", counted)
    prepared = Decoder._prepared

    def counted_natively(view: Decoder, rows: Rows, **named: object) -> object:
        starts.append(rows.start)
        return prepared(view, rows, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "_prepared", counted_natively)
    session.trunk("train", 3).prepare(range(5), session.workers)
    assert starts.count(1) > 0 and starts.count(0) == (1 if session.shared else 0)
    session.trunk("train", 3).prepare(range(5), session.workers)
    session._trunks.clear()
