"""The native decoder computes what MLX computes: losses, gradients and predictions of every method."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlx.utils import tree_map

from metapeft.backbones import Backbone, load
from metapeft.backbones.forward import run
from metapeft.kernels import decoder as kernels
from metapeft.kernels.decoder import Rows, decoder
from metapeft.peft import adapters
from metapeft.peft.adalora import AdaLoRA
from metapeft.runtime import BLAS, device, mx
from metapeft.training import native
from metapeft.training.configuration import full, split
from metapeft.training.evaluation import predict
from metapeft.training.session import Session
from metapeft.training.trainer import _Run
from tests.backbones.tiny import CONFIGS, tiny, write
from tests.training import made

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CASES = [(method, {}) for method in made.METHODS] + [("lora", {"layers": 2}), ("adalora", {"layers": 3})]

pytestmark = pytest.mark.skipif(device() != "cpu" or not BLAS.path, reason="the native decoder is for CPUs")


@pytest.fixture(scope="module", params=LIKE_LLAMA)
def session(request: pytest.FixtureRequest) -> Session:
    return made.session(request.param)


def started(session: Session, method: str, **values: object) -> _Run:
    adapter = made.moved(method, session, **values)
    _, train = split(full({"method": method}))
    run = _Run(session, adapter, train, 4, 0, None, SimpleNamespace(tokens=0, curve=[]), None)  # type: ignore[arg-type]
    if run.start > 0:
        session.trunk("train", run.start).prepare(range(len(run.examples)), session.workers)
    return run


def natively(run: _Run, indices: list[int], total: int, seed: int = 1) -> tuple[float, np.ndarray]:
    assert run.native is not None
    [(loss, found)] = run.session.workers.map(run.native.jobs([indices], total, [seed]))
    return float(loss), np.array(run.native.gradient(run.parameters, [found]))


def test_which_architectures_it_covers() -> None:
    loaded = [name for name in CONFIGS if name != "granitemoehybrid"]  # which is refused
    covered = {name for name in loaded if decoder(tiny(name).model) is not None}
    assert covered == set(LIKE_LLAMA)


@pytest.mark.parametrize(("method", "values"), CASES)
def test_loss_and_gradient_are_mlx_s(session: Session, method: str, values: dict[str, int]) -> None:
    run = started(session, method, **values)
    indices = run._batch(0)
    total = sum(len(run.examples[i].ids) - run.examples[i].start for i in indices)
    [(loss, gradient)] = session.workers.map([lambda: run._gradient(1, indices, total)])
    found, ours = natively(run, indices, total)
    assert abs(found - float(loss)) < 1e-5
    largest = float(np.abs(np.array(gradient)).max())
    assert largest > 1e-3
    assert np.abs(ours - np.array(gradient)).max() < 1e-5 * max(1.0, largest)
    assert run.native is not None
    run.native.checkpoint = True
    again, recomputed = natively(run, indices, total)
    assert again == found and np.array_equal(recomputed, ours)
    run.adapter.detach(session.model)


@pytest.mark.parametrize(("method", "values"), [*CASES, (None, {})])
def test_predictions_are_mlx_s(session: Session, method: str | None, values: dict[str, int]) -> None:
    adapter = made.moved(method, session, **values) if method else None
    assert native.usable(session, adapter) is not None
    ours = predict(session, adapter, "validation")
    view, session.decoder = session.decoder, None
    session._trunks.clear()
    theirs = predict(session, adapter, "validation")
    session.decoder = view
    session._trunks.clear()
    assert np.allclose(ours.loss_sum, theirs.loss_sum, rtol=1e-5, atol=1e-5)
    assert ours.label_scores is not None and theirs.label_scores is not None
    assert np.allclose(ours.label_scores, theirs.label_scores, rtol=1e-5, atol=1e-5)
    assert np.array_equal(ours.exact, theirs.exact) and np.array_equal(ours.tokens, theirs.tokens)
    if adapter is not None:
        adapter.detach(session.model)


def test_many_completion_tokens_take_several_blocks() -> None:
    at = made.session("llama", made.generation())
    run = started(at, "lora")
    indices = list(range(len(run.examples)))
    total = sum(len(run.examples[i].ids) - run.examples[i].start for i in indices)
    assert total > 64, "the native code computes 64 rows of logits at a time"
    [(loss, gradient)] = at.workers.map([lambda: run._gradient(1, indices, total)])
    found, ours = natively(run, indices, total)
    assert abs(found - float(loss)) < 1e-5 and np.allclose(ours, np.array(gradient), atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_dropout(method: str) -> None:
    """Its gradient is the slope of its loss; the seed decides what is dropped; predictions drop nothing."""
    at = made.session("llama")
    run = started(at, method, dropout=0.3)
    indices, total = run._batch(0), 20
    plain, _ = natively(started(made.session("llama"), method), indices, total)
    loss, gradient = natively(run, indices, total)
    assert loss != plain and loss == natively(run, indices, total)[0] != natively(run, indices, total, seed=2)[0]
    direction = np.array(mx.random.normal((run.vector.size,), key=mx.random.key(3)))
    direction *= 1e-2 / np.linalg.norm(direction)
    vector = np.array(run.vector)
    around = []
    for sign in (1, -1):
        run._set(mx.array(vector + sign * direction))
        around.append(natively(run, indices, total)[0])
    assert (around[0] - around[1]) / 2 == pytest.approx(float(gradient @ direction), rel=0.05, abs=1e-5)
    run._set(mx.array(vector))
    with_dropout = predict(at, run.adapter, "validation").loss_sum
    run.adapter.detach(at.model)
    other = made.moved(method, at)
    assert np.array_equal(with_dropout, predict(at, other, "validation").loss_sum)


@pytest.mark.parametrize("method", ["lora", "adalora", "prompt", "prefix", "p_tuning"])
def test_an_adapter_read_from_disk_predicts_as_the_one_that_was_saved(method: str, tmp_path: Path) -> None:
    """Its arrays are not computed yet when it is attached, and the workers' threads could not compute them."""
    at = made.session("llama")
    adapter = made.moved(method, at)  # attached
    if isinstance(adapter, AdaLoRA):  # with a rank out of force, which the file leaves out and reading puts back
        adapter.kept = {path: mx.array([[True], [False], [True]]) for path in adapter.deltas}
        for path, keep in adapter.kept.items():
            adapter.deltas[path].e = mx.where(keep, adapter.deltas[path].e, 0.0)
    before = predict(at, adapter, "validation").loss_sum
    adapters.save(adapter, tmp_path / "saved", {})
    adapter.detach(at.model)
    again = adapters.load(tmp_path / "saved", at.model)
    again.attach(at.model)
    try:
        assert np.allclose(predict(at, again, "validation").loss_sum, before, atol=1e-4)
    finally:
        again.detach(at.model)


def test_what_shares_rows_equals_what_repeats_them() -> None:
    """Common rows, a given prefix, and the whole sequence each time: the same hidden states."""
    model = tiny("qwen3").model
    view = decoder(model)
    assert view is not None
    shared, tails = [5, 9, 200, 31], [[7, 8], [40, 41, 42], [3]]
    whole = [view.forward(Rows(view.embed([*shared, *t]), [len(shared) + len(t)]))[len(shared) :] for t in tails]
    ends = np.cumsum([len(t) for t in tails])
    joined = [token for tail in tails for token in tail]
    both = Rows(view.embed([*shared, *joined]), [len(shared), *(len(shared) + ends)], common=len(shared))
    common = view.forward(both)
    prefix = view.record(Rows(view.embed(shared), [len(shared)]))
    behind = view.forward(Rows(view.embed(joined), ends.tolist(), prefix=prefix))
    assert np.allclose(common[len(shared) :], np.concatenate(whole), atol=1e-5)
    assert np.allclose(behind, np.concatenate(whole), atol=1e-5)


def test_an_unknown_layer_is_left_to_mlx() -> None:
    at = made.session("llama")
    assert native.usable(at, None) is not None
    attention = at.model.layers[1].self_attn
    plain = attention.q_proj
    attention.q_proj = plain.to_quantized(32, 4)
    assert native.usable(at, None) is None
    attention.q_proj = plain
    assert native.usable(at, None) is not None


def block(ffn: float, group: int) -> dict[str, object]:
    return {"attention": {"n_heads_in_group": group}, "ffn": {"ffn_mult": ffn}}


UNLIKE: dict[str, tuple[str, dict[str, object]]] = {
    "layers of several sizes": (
        "nemotron-nas",
        {"block_configs": [block(1.0, 4), block(24.0, 4), block(1.0, 4), block(1.0, 4)], "tie_word_embeddings": False},
    ),
    "angles that follow from the length": (
        "llama",
        {"max_position_embeddings": 600, "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 4.0}},
    ),
    "queries scaled by their position": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
                "rope_type": "default",
                "type": "default",
            }
        },
    ),
}


def changed(folder: Path, name: str, values: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> Backbone:
    monkeypatch.setitem(CONFIGS, name, CONFIGS.get(name, {}) | values)
    write(folder, name)
    return load(str(folder))


@pytest.mark.parametrize("what", UNLIKE)
def test_what_it_would_compute_wrongly_is_left_to_mlx(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, values = UNLIKE[what]
    model = changed(tmp_path, name, values, monkeypatch).model
    assert run(model, mx.array([[1, 2, 3]])).shape[:2] == (1, 3)
    assert decoder(model) is None


def test_virtual_tokens_beyond_the_window_are_left_to_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ["sliding_attention", "full_attention"] * 2
    values = {"max_position_embeddings": 4096, "sliding_window": 200, "layer_types": layers}
    at = Session(changed(tmp_path, "llama", values, monkeypatch), made.classification())
    assert at.seen is not None and 100 < at.seen < 200
    for method in ("prefix", "prompt"):
        for tokens in (100, 190):
            adapter = made.moved(method, at, tokens=tokens)
            assert (native.usable(at, adapter) is None) == (tokens > at.seen)
            found = predict(at, adapter, "validation").loss_sum
            with monkeypatch.context() as patch:
                patch.setattr(native, "usable", lambda *_: None)
                assert predict(at, adapter, "validation").loss_sum == pytest.approx(found, abs=1e-3)
            adapter.detach(at.model)


def test_what_is_not_a_number_stays_so() -> None:
    at = made.session("llama")
    adapter = made.moved("lora", at, targets=["q_proj"])
    adapter.module.update(tree_map(lambda value: value * float("nan"), adapter.module.trainable_parameters()))
    mx.eval(adapter.module.parameters())
    assert native.usable(at, adapter) is not None
    assert np.isnan(predict(at, adapter, "validation").loss_sum).all()
    adapter.detach(at.model)


def test_without_a_compiler_mlx_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels.native.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setenv("PATH", "")
            patched.setenv("XDG_CACHE_HOME", str(tmp_path))
            patched.delenv("CXX", raising=False)
            assert decoder(tiny("llama").model) is None
            assert decoder(tiny("llama").model) is None
            warning = capsys.readouterr().err
            assert warning.count("native") == 1 and "C++ compiler" in warning
    finally:
        kernels.native.cache_clear()
    assert decoder(tiny("llama").model) is not None
