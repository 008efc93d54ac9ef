"""The adapter library: the best of every task and method, whole whoever writes and dies, found by likeness."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.meta import library
from metapeft.meta.evidence import FEATURES
from metapeft.meta.model import Model
from metapeft.peft import adapters, checkpoints
from metapeft.peft.lora import LoRAConfig
from metapeft.peft.prompt import PromptConfig
from metapeft.peft.saved import Saved
from metapeft.runtime import mx
from metapeft.training.evaluation import predict
from metapeft.training.trial import Score, Trial
from tests.meta import made
from tests.training import made as trained

ROOT = Path(__file__).resolve().parents[2]


def adapter(value: float, rank: int = 2, method: object = "lora") -> Saved:
    """A LoRA, or a prompt, whose every number is `value`."""
    if method == "prompt":
        table = {"prompt_embeddings": mx.full((2, 8), value)}
        return Saved(PromptConfig(tokens=2), table, {"backbone": made.BACKBONE})
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{start}A.weight": mx.full((rank, 8), value), f"{start}B.weight": mx.full((8, rank), value)}
    return Saved(LoRAConfig(rank=rank, targets=("q_proj",)), tensors, {"backbone": made.BACKBONE})


def task(name: str) -> Task:
    return replace(made.task(name), family=f"{name}s", source="a book", licence="CC0-1.0")


def trial(validation: float, name: str = "spam", **values: object) -> Trial:
    held = Score("accuracy", validation, 0.05, 64, 1.0)
    return made.trial(0.7, name, **{"validation": held, **values})  # type: ignore[arg-type]


def offered(room: Path, validation: float, name: str = "spam", rank: int = 2, **values: object) -> bool:
    """Offers an adapter whose every number is its validation score."""
    checkpoints.write(room / "trained", adapter(validation, rank, values.get("method", "lora")))
    features = values.pop("features", {})
    assert isinstance(features, dict)
    return library.offer(
        room / "trained", trial(validation, name, **values), task(name), made.profile(name, **features)
    )


def test_the_best_adapter_of_a_task_and_method_is_kept(tmp_path: Path) -> None:
    assert offered(tmp_path, 0.5)
    assert not offered(tmp_path, 0.4)
    assert offered(tmp_path, 0.75)
    assert not offered(tmp_path, 0.75), "the same again is no better"
    assert offered(tmp_path, 0.25, method="prompt")
    assert offered(tmp_path, 0.25, name="other")
    kept = {(e.trial.task, e.trial.method): e for e in library.entries()}
    assert kept.keys() == {("spam", "lora"), ("spam", "prompt"), ("other", "lora")}
    best = kept["spam", "lora"]
    assert best.trial.validation and best.trial.validation.value == 0.75 and best.trial.adapter == ""
    assert {float(v) for t in best.read().tensors.values() for v in t.flatten()} == {0.75}
    assert (best.family, best.source, best.licence, best.labels) == ("spams", "a book", "CC0-1.0", ("no", "yes"))
    assert best.features == made.profile().features and best.profile_version and best.gain == pytest.approx(0.2)
    shown = best.to_json()
    assert shown["licence"] == "CC0-1.0" and shown["validation"]["value"] == 0.75 and Path(shown["folder"]).is_dir()


@pytest.mark.parametrize("status", ["stopped", "diverged"])
def test_unfinished_and_unmeasured_trials_are_not_taken(tmp_path: Path, status: str) -> None:
    assert not offered(tmp_path, 0.9, status=status)
    assert not offered(tmp_path, math.nan)
    assert library.entries() == []


def test_another_methods_adapter_is_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "trained", adapter(0.5))
    with pytest.raises(UserError, match="holds lora, but the trial is of prefix"):
        library.offer(tmp_path / "trained", trial(0.5, method="prefix"), task("spam"), made.profile("spam"))
    assert not library.entries()


def test_size_must_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SMALL", 16.0)
    assert offered(tmp_path, 0.5, rank=2)
    assert not offered(tmp_path, 0.509, rank=8), "two doublings for less than a hundredth"
    assert offered(tmp_path, 0.52, rank=8)
    monkeypatch.setattr(library, "LARGEST", 200.0)
    assert not offered(tmp_path, 0.9, rank=8)


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "trained", adapter(1.0))
    (tmp_path / "trained" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="manifest says"):
        library.offer(tmp_path / "trained", trial(0.9), task("spam"), made.profile())
    assert library.entries() == []


@pytest.mark.parametrize("method", trained.METHODS)
def test_half_precision_changes_almost_nothing(method: str, tmp_path: Path) -> None:
    at = trained.session()
    moved = trained.moved(method, at)
    exact = predict(at, moved, "test")
    adapters.save(moved, tmp_path / "trained", {})
    moved.detach(at.model)
    held = replace(trial(0.5), method=method)
    assert library.offer(tmp_path / "trained", held, at.task, made.profile())
    [entry] = library.entries()
    tensors = entry.read().tensors.values()
    assert {t.dtype for t in tensors} == {mx.float16}
    assert entry.bytes == sum(t.nbytes for t in tensors)
    again = adapters.load(entry.folder, at.model)
    again.attach(at.model)
    rounded = predict(at, again, "test")
    again.detach(at.model)
    np.testing.assert_allclose(rounded.loss_sum, exact.loss_sum, rtol=5e-3, atol=5e-3)


def test_numbers_that_float16_lacks_stay(tmp_path: Path) -> None:
    assert offered(tmp_path, 1e5)
    [entry] = library.entries()
    assert {float(v) for t in entry.read().tensors.values() for v in t.flatten()} == {1e5}


def test_the_nearest_tasks_come_first(tmp_path: Path) -> None:
    """By the metric of the model: only what it weighs counts."""
    model = Model(metric=replace(Model().metric, weights=tuple(float(n == "labels") for n in FEATURES)))
    for name, labels in (("far", 60.0), ("near", 3.0), ("middle", 12.0)):
        assert offered(tmp_path, 0.5, name, features={"labels": labels})
    assert offered(tmp_path, 0.6, "near", method="prompt", features={"labels": 3.0})
    assert offered(tmp_path, 0.9, "mine", features={"labels": 2.0})
    here = made.profile("mine", labels=2.0)

    def found(**options: object) -> list[tuple[str, str]]:
        near = library.find(here, model=model, **options)  # type: ignore[arg-type]
        assert [f.similarity for f in near] == sorted((f.similarity for f in near), reverse=True)
        return [(f.entry.trial.task, f.entry.trial.method) for f in near]

    everything = [("near", "prompt"), ("near", "lora"), ("middle", "lora"), ("far", "lora")]
    assert found() == everything, "never the task itself"
    assert found(count=1) == everything[:2]
    assert found(methods={"lora"}) == everything[1:]
    assert found(without={"nears", "far"}) == [("middle", "lora")]
    assert library.find(replace(here, backbone_content="other"), model=model) == []
    assert library.find(replace(here, version="0"), model=model) == []


def test_an_empty_library_finds_nothing() -> None:
    assert library.entries() == [] and library.find(made.profile()) == []


def writer(room: Path, scores: list[float]) -> subprocess.Popen[bytes]:
    """A process that offers adapters, saying each that was taken."""
    code = (
        "import sys; from pathlib import Path; from tests.meta.test_library import offered\n"
        "for score in sys.argv[2:]: print(score if offered(Path(sys.argv[1]), float(score)) else '', flush=True)"
    )
    room.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(room), *map(str, scores)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_scores_by_different_metrics_are_not_compared(tmp_path: Path) -> None:
    assert offered(tmp_path, 0.75)
    other = trial(0.5)
    for value, taken in ((0.5, True), (0.4, False), (0.6, True)):
        other.score = other.validation = Score("macro_f1", value, 0.05, 64, 1.0)
        assert library.offer(tmp_path / "trained", other, task("spam"), made.profile()) == taken


def test_several_writers_leave_the_best(tmp_path: Path) -> None:
    scores = [round(0.01 * n, 2) for n in range(1, 41)]
    random.Random(0).shuffle(scores)
    writers = [writer(tmp_path / str(n), scores[n::2]) for n in range(2)]
    for process in writers:
        process.communicate(timeout=120)
        assert process.returncode == 0
    [entry] = library.entries()
    assert entry.trial.validation and entry.trial.validation.value == 0.4
    assert {round(float(v), 3) for t in entry.read().tensors.values() for v in t.flatten()} == {0.4}


def test_killed_writers_leave_whole_adapters_no_worse_than_they_said(tmp_path: Path) -> None:
    best = -math.inf
    for attempt in range(4):
        process = writer(tmp_path / "room", [round(0.01 * n + 0.001 * attempt, 3) for n in range(1, 200)])
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(5)]
        time.sleep(0.01 * attempt)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        said += process.communicate()[0].splitlines()
        best = max([best, *(float(line) for line in said if line.strip())])
        [entry] = library.entries()
        assert entry.trial.validation and entry.trial.validation.value >= best
        value = entry.trial.validation.value
        assert {round(float(v), 3) for t in entry.read().tensors.values() for v in t.flatten()} == {value}
