"""A prefix behind a gate begins as an identity, opens, and is a prefix like any other in the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metapeft.backbones.forward import Gated, caches
from metapeft.backbones.forward import run as forward
from metapeft.peft import adapters, create, parse
from metapeft.peft.prefix import Prefix
from metapeft.runtime import mx
from metapeft.switching import handover
from metapeft.training import trainer
from metapeft.training.evaluation import evaluate, predict
from metapeft.training.session import Session
from metapeft.training.trial import Trial
from tests.backbones.tiny import CONFIGS, tiny
from tests.switching import made
from tests.training import made as training


@pytest.fixture(scope="module")
def session() -> Session:
    return made.session()


def fresh(session: Session, tokens: int = 4) -> Prefix:
    found = create(parse("prefix", {"tokens": tokens}), session.model, seed=0, text_ids=[5, 6, 7, 8])
    assert isinstance(found, Prefix)
    return found


def losses(session: Session, adapter: Any) -> np.ndarray:
    return predict(session, adapter, "validation").loss_sum


@pytest.mark.parametrize("native", [True, False])
def test_closed_it_is_not_there_and_open_it_is_a_prefix(session: Session, native: bool, monkeypatch: Any) -> None:
    if not native:
        monkeypatch.setattr(session, "decoder", None)
    assert (session.decoder is not None) == native
    adapter, plain = fresh(session), fresh(session)
    without, whole = losses(session, None), losses(session, plain)
    assert abs(without - whole).max() > 0.01
    adapter.open_over(4)
    assert losses(session, adapter) == pytest.approx(without, abs=1e-4)
    between = []
    for step in range(4):
        adapter.before_step(step)
        between.append(float(abs(losses(session, adapter) - whole).max()))
    assert between == sorted(between, reverse=True) and between[-1] == 0 < between[0]
    assert not isinstance(adapter.prefix(session.model), Gated)


@pytest.mark.parametrize("weight", [0.0, 0.03, 0.5])
def test_native_and_mlx_weigh_alike(session: Session, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = fresh(session)
    adapter.weight = weight
    natively = losses(session, adapter)
    with monkeypatch.context() as patch:
        patch.setattr(session, "decoder", None)
        assert losses(session, adapter) == pytest.approx(natively, rel=1e-4)


def test_a_weight_is_a_share_in_the_softmax() -> None:
    """Two copies of a token, each at half its weight, are that token once."""
    model: Any = tiny("llama").model
    ids = mx.array([[3, 4, 5, 6]])
    session = made.session()
    layers = fresh(session, tokens=3).prefix(model)
    twice = [(mx.concatenate([k, k], axis=2), mx.concatenate([v, v], axis=2)) for k, v in layers]
    halves, once = (
        np.array(forward(model, ids, cache=caches(Gated(twice, tokens, weight, mx.float32))))
        for tokens, weight in ((6, 0.5), (3, 0.0))
    )
    assert halves == pytest.approx(once, abs=1e-4)
    assert abs(halves - np.array(forward(model, ids, cache=caches(twice)))).max() > 1e-3


@pytest.mark.parametrize("old", ["lora", "adalora"])
def test_on_matrices_nothing_changes_and_what_is_left_is_a_prefix_on_them(
    session: Session, tmp_path: Path, old: str
) -> None:
    trial, record = made.train(session, tmp_path / "x", old, "prefix", steps=60, prefix=0.9, untuned=0.0)
    leg = record.legs[1]
    assert leg.how == "gated" and not leg.undone and leg.change is not None and leg.change["largest"] < 1e-3
    assert leg.trial is not None and len(leg.trial["curve"]) == 3
    kept = adapters.load(tmp_path / "x", session.model)
    if not record.back:
        assert handover.tokens(kept) == "keys" and handover.parts(kept)[0] is not None
    kept.attach(session.model)
    again = evaluate(session, kept, "test")
    kept.detach(session.model)
    assert trial.score is not None and again.value == trial.score.value


def test_killed_after_its_last_step_it_is_judged_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = training.session(task=training.classification(train=60, rest=120, labels=("no", "yes")))
    values = {"method": "prefix", "learning_rate": 0.05, "tokens": 4, "batch_size": 4, "evaluations": 2}

    def trained(folder: Path) -> Trial:
        gated = lambda adapter: adapter.open_over(2)  # noqa: E731
        return trainer.run_trial(session, values, steps=12, folder=folder, test=False, prepare=gated)

    whole = trained(tmp_path / "whole").validation
    monkeypatch.setattr(trainer, "STATE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer._Run, "validated", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        trained(tmp_path / "killed")
    assert trained(tmp_path / "killed").validation == whole


def test_gradients_through_a_half_open_gate_are_mlx_s(session: Session) -> None:
    from metapeft.runtime import nn
    from metapeft.training import native
    from metapeft.training.session import completion_logits
    from metapeft.training.vector import Layout

    adapter = fresh(session)
    adapter.weight = 0.4
    layout = Layout(adapter.module.trainable_parameters())
    assert session.decoder is not None
    loss = native.Loss(session, session.decoder, adapter, layout, 0, False)
    indices = [0, 1, 2]
    total = sum(len(session.encoded["train"][i].ids) - session.encoded["train"][i].start for i in indices)
    parameters = adapter.module.trainable_parameters()
    [job] = loss.jobs([indices], total, [0])
    value, gradient = job()()
    found = loss.gradient(parameters, [gradient])

    def mlx(parameters: Any) -> mx.array:
        adapter.module.update(parameters)
        shard = session.shard("train", indices, 0)
        logits = completion_logits(session.model, session.prefix(adapter), shard, 0)
        return nn.losses.cross_entropy(logits, shard.targets, reduction="sum") / total

    expected, tree = mx.value_and_grad(mlx)(parameters)
    adapter.module.update(parameters)
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    assert np.array(found) == pytest.approx(np.array(layout.join(tree)), abs=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_masks_have_the_precision_of_the_model(name: str, dtype: str) -> None:
    model: Any = copy.deepcopy(tiny(name).model)
    model.set_dtype(getattr(mx, dtype))
    adapter = create(parse("prefix", {"tokens": 3}), model, seed=0, text_ids=[5, 6, 7, 8])
    assert isinstance(adapter, Prefix)
    ids = mx.array([[3, 4, 5, 6, 7]])
    outputs = []
    for weight in (0.0, 0.5, 1.0):
        adapter.weight = weight
        out = forward(model, ids, cache=caches(adapter.prefix(model))).astype(mx.float32)
        assert np.isfinite(np.array(out)).all()
        outputs.append(np.array(out))
    assert abs(outputs[0] - outputs[2]).max() > abs(outputs[1] - outputs[2]).max() > 0


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"gpt2", "minicpm3", "granitemoehybrid"}))
def test_closed_it_is_an_identity_of_every_architecture_with_relative_positions(name: str) -> None:
    """GPT-2's text moves on in its table of positions; the two others are refused."""
    model: Any = tiny(name).model
    adapter = create(parse("prefix", {"tokens": 3}), model, seed=0, text_ids=[5, 6, 7, 8])
    assert isinstance(adapter, Prefix)
    adapter.weight = 0.0
    ids = mx.array([[3, 4, 5, 6, 7]])
    found = forward(model, ids, cache=caches(adapter.prefix(model)))
    assert np.array(found) == pytest.approx(np.array(forward(model, ids)), abs=1e-4)
