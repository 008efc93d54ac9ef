"""Training: a pure function of its inputs, whatever splits, bounds or interrupts it."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_map

from metapeft.backbones import Backbone
from metapeft.backbones.forward import anatomy
from metapeft.errors import UserError
from metapeft.peft import adapters
from metapeft.peft.base import METHODS
from metapeft.peft.lora import MatrixAdapter
from metapeft.runtime import mx, nn
from metapeft.training import trainer
from metapeft.training.configuration import TrainConfig
from metapeft.training.evaluation import evaluate
from metapeft.training.session import Session, completion_logits
from metapeft.training.trainer import evaluated, learning_rate, run_trial
from metapeft.training.vector import Layout, leaves
from metapeft.training.workers import Workers
from tests.backbones.tiny import ARCHITECTURES, tiny_folder
from tests.training import made

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def session() -> Session:
    return made.session()


def configuration(method: str, **values: Any) -> dict[str, Any]:
    return {"method": method, "evaluations": 2} | made.SMALL.get(method, {}) | values


def weights(session: Session, folder: Path) -> dict[str, np.ndarray]:
    adapter = adapters.load(folder, session.model)
    return {name: np.array(value) for name, value in leaves(adapter.module.parameters())}


def trained(session: Session, folder: Path, steps: int = 6, **values: Any) -> dict[str, np.ndarray]:
    trial = run_trial(session, configuration(**values), steps=steps, folder=folder)
    assert trial.status == "ok", trial.error
    return weights(session, folder)


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.allclose(value, second[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("method", METHODS)
def test_the_same_inputs_give_the_same_bits(session: Session, method: str, tmp_path: Path) -> None:
    """Also in a session that has trained something else before, and with dropout."""
    values = {"dropout": 0.2, "layers": 2} if method in ("lora", "adalora") else {}
    first = trained(session, tmp_path / "first", method=method, **values)
    trained(session, tmp_path / "other", steps=3, method="lora", layers=3, batch_size=5)
    second = trained(session, tmp_path / "second", method=method, **values)
    fresh = trained(made.session(), tmp_path / "fresh", method=method, **values)
    assert_same(first, second)
    assert_same(first, fresh)
    trial = run_trial(session, configuration(method, **values), steps=6, seed=1, folder=tmp_path / "seed")
    assert trial.status == "ok"
    differences = [np.abs(v - first[name]).max() for name, v in weights(session, tmp_path / "seed").items()]
    assert max(differences) > 1e-4, "the seed matters"


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(session: Session, method: str) -> None:
    ids = mx.array([[1, 2, 3]])
    before = np.array(session.model(ids))
    trial = run_trial(session, configuration(method), steps=20)
    assert trial.status == "ok" and trial.score is not None and trial.untuned_score is not None
    assert trial.score.loss < trial.untuned_score.loss
    assert trial.trained_parameters > 0 and trial.tokens > 0 and trial.peak_memory_mb > 0 and trial.seconds > 0
    assert [row["step"] for row in trial.curve] == [10, 20] and trial.curve[-1]["examples"] == 160
    assert np.array_equal(before, session.model(ids))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [{"accumulate": 3}, {"checkpoint": True}], ids=["accumulate", "checkpoint"])
def test_less_memory_gives_the_same_result(
    session: Session, method: str, values: dict[str, Any], tmp_path: Path
) -> None:
    plain = trained(session, tmp_path / "plain", steps=3, method=method)
    assert_same(plain, trained(session, tmp_path / "less", steps=3, method=method, **values), 2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_several_workers_equal_one(method: str, tmp_path: Path) -> None:
    """Adam divides by the gradient's size: a rounding difference in a near-zero gradient can move a weight visibly, so
    the step is small."""
    found = []
    for count in (1, 3):
        session = made.session()
        session.workers = Workers(count)
        found.append(trained(session, tmp_path / str(count), steps=3, method=method, learning_rate=1e-4))
        session.workers.close()
    assert_same(*found, 2e-5)


def gradients(session: Session, adapter: Any, indices: list[int], accumulate: int = 1, checkpoint: bool = False) -> Any:
    config = TrainConfig(batch_size=len(indices), accumulate=accumulate, checkpoint=checkpoint)
    trial: Any = None
    run = trainer._Run(session, adapter, config, 10, 0, None, trial, None)
    total = sum(len(session.encoded["train"][i].ids) - session.encoded["train"][i].start for i in indices)
    parts = trainer.shards([run.lengths[i] for i in indices], session.workers.count * accumulate)
    found = session.workers.map(
        [lambda n=n, part=part: run._gradient(n, [indices[i] for i in part], total) for n, part in enumerate(parts)]
    )
    return sum(float(loss.item()) for loss, _ in found), np.sum([np.array(g) for _, g in found], axis=0)


@pytest.mark.parametrize("method", METHODS)
def test_shards_micro_batches_and_checkpoints_give_the_gradient_of_the_mean_token_loss(method: str) -> None:
    """Against one plain pass over each example alone, in the plain model."""
    session = made.session()
    adapter = made.moved(method, session)
    indices = [5, 0, 17, 30, 2]
    layout = Layout(adapter.module.trainable_parameters())

    def loss(vector: mx.array) -> mx.array:
        adapter.module.update(layout.split(vector))
        losses = []
        for index in indices:
            shard = session.shard("train", [index], 0)
            logits = completion_logits(session.model, session.prefix(adapter), shard, 0)
            losses.append(nn.losses.cross_entropy(logits, shard.targets))
        return mx.concatenate(losses).mean()

    vector = layout.join(adapter.module.trainable_parameters())
    value, expected = mx.value_and_grad(loss)(vector)
    adapter.module.update(layout.split(vector))
    assert np.abs(np.array(expected)).max() > 1e-3
    for settings in ({}, {"accumulate": 2}, {"checkpoint": True}):
        for count in (1, 2, 3):
            session.workers = Workers(count)
            found, gradient = gradients(session, adapter, indices, **settings)
            session.workers.close()
            assert found == pytest.approx(value.item(), abs=1e-5)
            assert np.allclose(gradient, expected, atol=2e-5)
    adapter.detach(session.model)


def test_the_layers_below_the_lowest_adapted_one_are_not_run_again(session: Session, tmp_path: Path) -> None:
    """Training on the cached trunk gives the same weights as without it."""
    cached = trained(session, tmp_path / "cached", steps=3, method="lora", layers=2, learning_rate=1e-4)
    lowest = MatrixAdapter.lowest_layer
    MatrixAdapter.lowest_layer = lambda self: 0  # type: ignore[method-assign]
    try:
        whole = trained(session, tmp_path / "whole", steps=3, method="lora", layers=2, learning_rate=1e-4)
    finally:
        MatrixAdapter.lowest_layer = lowest  # type: ignore[method-assign]
    assert_same(cached, whole, 2e-5)


def test_dropout_acts_in_training_steps_and_nowhere_else(session: Session, tmp_path: Path) -> None:
    assert_same(
        trained(session, tmp_path / "a", steps=2, method="lora"),
        trained(session, tmp_path / "b", steps=2, method="lora", dropout=0.0),
    )
    with_dropout = trained(session, tmp_path / "c", steps=2, method="lora", dropout=0.5)
    plain = trained(session, tmp_path / "d", steps=2, method="lora")
    assert max(np.abs(value - plain[name]).max() for name, value in with_dropout.items()) > 1e-4
    adapter = adapters.load(tmp_path / "c", session.model)
    adapter.attach(session.model)
    assert evaluate(session, adapter, "test") == evaluate(session, adapter, "test")
    adapter.detach(session.model)


def test_frozen_weights_get_no_gradient(session: Session) -> None:
    """None of the backbone's weights is trainable while an adapter is attached."""
    adapter = made.moved("lora", session)
    own = {id(value) for _, value in leaves(adapter.module.trainable_parameters())}
    assert {id(value) for _, value in leaves(session.model.trainable_parameters())} <= own
    adapter.detach(session.model)


@pytest.mark.slow
def test_a_huge_learning_rate_is_found_to_diverge(smollm: Backbone) -> None:
    """On a model that has something to lose, and long before the budget is spent."""
    session = Session(smollm, made.classification(24, 4))
    huge = {"learning_rate": 30.0, "clip": 0.0, "warmup": 0.0, "layers": 4, "batch_size": 4}
    trial = run_trial(session, configuration("lora", **huge), steps=100)
    assert trial.status == "diverged" and "the loss rose from" in trial.error
    assert trial.score is None and trial.untuned_score is not None
    again = run_trial(session, configuration("lora", layers=4), steps=2)
    assert again.status == "ok", "the session is usable afterwards"


@pytest.mark.parametrize(
    "losses, diverges",
    [
        ([10, 8, 5, 3, 2, 1, 0.5, 0.3, 0.2, 0.1] + [0.3, 0.05] * 10, False),
        ([10.0] * 40, False),
        ([10, 5] + [0.5] * 20 + [1.5] * 20, False),
        ([10, 5] + [0.5] * 10 + [9.0] * 10, True),
        ([2.0] * 5 + [9.0] * 5, True),
        ([4.0] * 5 + [math.log(256)] * 9, True),
        ([5.3] * 5 + [math.log(256)] * 9, False),
        ([1.0, float("inf")], True),
    ],
)
def test_what_counts_as_diverging(session: Session, losses: list[float], diverges: bool) -> None:
    adapter = made.moved("prompt", session)
    trial: Any = None
    run = trainer._Run(session, adapter, TrainConfig(), 100, 0, None, trial, None)
    adapter.detach(session.model)

    def feed() -> None:
        for loss in losses:
            run.step += 1
            run.losses.append(loss)
            run._check(loss)

    if diverges:
        with pytest.raises(trainer.Diverged):
            feed()
    else:
        feed()


def test_not_a_number_is_found_at_once(session: Session) -> None:
    layer = getattr(anatomy(session.model).body, anatomy(session.model).layers)[0]
    norm = layer.input_layernorm.weight
    layer.input_layernorm.weight = mx.full(norm.shape, float("nan"))
    mx.eval(layer.input_layernorm.weight)
    try:
        trial = run_trial(session, configuration("lora"), steps=5, test=False)
    finally:
        layer.input_layernorm.weight = norm
    assert trial.status == "diverged" and trial.error == "the loss was nan at step 1"


def test_weights_that_break_in_the_last_step_are_found(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer._Run._evaluate

    def broken(run: trainer._Run) -> dict[str, Any]:
        if run.step == run.steps:
            run._set(run.vector * float("nan"))
        return real(run)

    monkeypatch.setattr(trainer._Run, "_evaluate", broken)
    trial = run_trial(session, configuration("lora"), steps=4, test=False)
    assert trial.status == "diverged" and trial.error == "the validation loss was nan at step 4"


def test_early_stopping_keeps_the_best_weights(session: Session, tmp_path: Path) -> None:
    values = {"learning_rate": 0.05, "evaluations": 20, "patience": 2, "schedule": "constant"}
    trial = run_trial(session, configuration("lora", **values), steps=60, folder=tmp_path / "a")
    assert trial.status == "ok" and trial.curve[-1]["step"] < 60
    best = max(trial.curve, key=lambda row: (row["validation_score"], -row["validation_loss"]))
    assert trial.curve.index(best) == len(trial.curve) - 3, "two evaluations without improvement after the best"
    assert trial.validation is not None and trial.validation.value == best["validation_score"]
    adapter = adapters.load(tmp_path / "a", session.model)
    adapter.attach(session.model)
    assert evaluate(session, adapter, "validation").loss == pytest.approx(best["validation_loss"], abs=1e-4)
    adapter.detach(session.model)


def test_a_sample_chooses_the_weights_and_the_whole_split_scores_them(tmp_path: Path) -> None:
    session = made.session(task=made.classification(40, 90))
    trial = run_trial(session, configuration("lora"), steps=8, folder=tmp_path / "a", test=False)
    adapter = adapters.load(tmp_path / "a", session.model)
    adapter.attach(session.model)
    chosen = trainer.sample(90)
    assert chosen is not None and len(set(chosen)) == len(chosen) == 64 and max(chosen) < 90
    found = evaluate(session, adapter, "validation", chosen)
    adapter.detach(session.model)
    best = max(trial.curve, key=lambda row: (row["validation_score"], -row["validation_loss"]))
    assert (found.value, found.n) == (best["validation_score"], 64)
    assert found.loss == pytest.approx(best["validation_loss"], abs=1e-4)
    assert trial.validation is not None and trial.validation.n == 90


def test_progress_may_stop_a_trial(session: Session, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def stop(event: dict[str, Any]) -> bool:
        seen.append(event)
        return event["step"] == 3

    trial = run_trial(session, configuration("lora"), steps=50, folder=tmp_path / "a", progress=stop)
    assert trial.status == "stopped" and [event["step"] for event in seen] == [1, 2, 3]
    assert trial.validation is not None and (tmp_path / "a" / "manifest.json").exists()


@pytest.mark.parametrize("why", ["asked for", "patience"])
def test_killed_after_a_stop_the_next_run_stops_there_too(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(trainer, "STATE_SECONDS", 0.0)
    values = {"learning_rate": 0.05, "evaluations": 20, "patience": 2, "schedule": "constant"}
    given = configuration("lora", **values) if why == "patience" else configuration("lora")

    def asked(event: dict[str, Any]) -> bool:
        return why == "asked for" and event["step"] == 3

    whole = run_trial(session, given, steps=60, folder=tmp_path / "whole", progress=asked)

    def killed(run: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "validated", killed)
        with pytest.raises(KeyboardInterrupt):
            run_trial(session, given, steps=60, folder=tmp_path / "killed", progress=asked)
    assert (tmp_path / "killed" / "state.safetensors").exists()
    again = run_trial(session, given, steps=60, folder=tmp_path / "killed", progress=asked)
    assert [row["step"] for row in again.curve] == [row["step"] for row in whole.curve]
    assert again.status == whole.status and again.score == whole.score
    assert_same(weights(session, tmp_path / "whole"), weights(session, tmp_path / "killed"))


def test_after_a_kill_progress_sees_the_whole_curve_and_the_peak_of_before(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "STATE_SECONDS", 0.0)
    seen: list[dict[str, Any]] = []

    def killed(event: dict[str, Any]) -> bool:
        if event["step"] == 6:
            raise KeyboardInterrupt
        return False

    def watch(event: dict[str, Any]) -> bool:
        if "curve" in event:
            seen.append(event)
        return False

    given = configuration("lora", evaluations=4)
    peak = trainer._Run.peak_memory_mb
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "peak_memory_mb", lambda run: peak(run) + 1e4)
        with pytest.raises(KeyboardInterrupt):
            run_trial(session, given, steps=12, folder=tmp_path / "a", progress=killed)
    trial = run_trial(session, given, steps=12, folder=tmp_path / "a", progress=watch)
    assert [[row["step"] for row in event["curve"]] for event in seen] == [[3, 6], [3, 6, 9], [3, 6, 9, 12]]
    assert trial.peak_memory_mb > 1e4 and all(event["peak_memory_mb"] > 1e4 for event in seen)


def test_out_of_memory_is_a_status(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapeft.runtime.free_memory_mb", lambda: 1.0)
    trial = run_trial(session, configuration("lora"), steps=5)
    assert trial.status == "out_of_memory" and "free" in trial.error


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = TrainConfig(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(
        learning_rate(TrainConfig(learning_rate=1.0, warmup=0.0, schedule="constant"), s, 9) == 1 for s in range(9)
    )


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_method_trains_on_every_architecture(architecture: str, quantized: bool, tmp_path: Path) -> None:
    session = made.session(architecture, made.classification(16, 6), quantized)
    for method in METHODS:
        folder = tmp_path / method
        try:
            trial = run_trial(session, configuration(method, evaluations=1), steps=2, folder=folder)
        except UserError as error:
            pytest.fail(f"{method} on {architecture}: {error}")
        assert trial.status == "ok", (method, trial.error)
        first = {name: value for name, value in weights(session, folder).items()}
        assert all(np.isfinite(value).all() for value in first.values())


# Killed and continued


def start(folder: Path, methods: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.killed", str(tiny_folder("llama")), str(folder), *methods]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def contents(folder: Path, methods: tuple[str, ...]) -> dict[str, tuple[bytes, Any]]:
    found = {}
    for method in methods:
        record = json.loads((folder / method / "metapeft.json").read_text(encoding="utf-8"))["metadata"]["trial"]
        for name in ("seconds", "train_seconds", "peak_memory_mb", "started", "adapter"):
            record.pop(name)
        for row in record["curve"]:
            row.pop("seconds")
        found[method] = ((folder / method / "adapter_model.safetensors").read_bytes(), record)
    return found


def kill_until_done(folder: Path, methods: tuple[str, ...], kills: int, seed: int) -> int:
    """Kills the training at random moments, then lets it end; returns how many of its lives continued a trial."""
    chance = random.Random(seed)
    continued = 0
    for life in range(kills + 1):
        child = start(folder, methods)
        assert child.stdout is not None
        lines = chance.randint(2, 12) if life < kills else 10**9
        for n, line in enumerate(child.stdout, 1):
            continued += n == 1 and line.startswith("step") and line.strip() != "step 1"
            if n >= lines:
                time.sleep(chance.uniform(0, 0.05))  # anywhere in a step, or while its state is written
                child.kill()
                break
        child.stdout.close()
        if child.wait(60) == 0:
            break
    assert child.returncode == 0
    return continued


@pytest.mark.parametrize(
    "methods, kills",
    [(("lora",), 2), pytest.param(METHODS, 9, marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_killed_at_any_moment_and_started_again_ends_with_the_same_bits(
    methods: tuple[str, ...], kills: int, tmp_path: Path
) -> None:
    child = start(tmp_path / "whole", methods)
    assert child.communicate(timeout=120)[0].count("step") == 14 * len(methods) and child.returncode == 0
    assert kill_until_done(tmp_path / "killed", methods, kills, seed=kills) >= kills // 2
    assert contents(tmp_path / "whole", methods) == contents(tmp_path / "killed", methods)


def test_a_state_of_another_trial_or_engine_or_a_damaged_one_is_not_continued(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "STATE_SECONDS", 0.0)
    plain = trained(session, tmp_path / "plain", steps=3, method="prompt")

    class Stop(Exception):
        pass

    def crash(event: dict[str, Any]) -> None:
        if event["step"] == 2:
            raise Stop

    for name, steps in (("another trial", 30), ("damaged", 3), ("another engine", 3)):
        folder = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(Stop):
            if name == "another engine":
                patch.setattr(trainer, "engine", lambda: "000000")
            run_trial(session, configuration("prompt"), steps=steps, folder=folder, progress=crash)
        state = folder / "state.safetensors"
        assert state.exists()
        if name == "damaged":
            state.write_bytes(state.read_bytes()[:100])
        seen: list[dict[str, Any]] = []
        again = run_trial(session, configuration("prompt"), steps=3, folder=folder, progress=seen.append)
        assert again.status == "ok" and [event["step"] for event in seen] == [1, 2, 3]
        assert_same(plain, weights(session, folder))
        assert not state.exists()


def test_detaching_restores_the_very_arrays_that_were_there(session: Session) -> None:
    before = tree_map(id, session.model.parameters())
    run_trial(session, configuration("adalora"), steps=2)
    assert tree_map(id, session.model.parameters()) == before


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 7])
def test_evaluated_as_often_as_asked_but_for_rounding_and_at_the_end(evaluations: int) -> None:
    for steps in range(evaluations, 130):
        found = evaluated(steps, evaluations)
        assert max(found) == steps and min(found) > 0
        if steps % evaluations == 0:
            assert sorted(found) == [steps // evaluations * (n + 1) for n in range(evaluations)]
        elif steps > 3 * evaluations:
            assert abs(len(found) - evaluations) <= 1
