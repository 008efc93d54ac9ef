"""`import metapeft`: instant, lazy, and what it gives is what the command line does."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

import metapeft
from metapeft import api
from metapeft.settings import DataSettings, load_settings
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file

ROOT = Path(__file__).resolve().parents[1]


def test_importing_it_imports_nothing_else() -> None:
    code = """
import sys, time
start = time.perf_counter(); before = set(sys.modules)
import metapeft
seconds = time.perf_counter() - start
print(seconds, *sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, *modules = done.stdout.split()
    assert float(seconds) < 0.1
    assert modules == ["metapeft"]


def test_names_are_found_when_used_and_others_are_not() -> None:
    assert metapeft.train is api.train and metapeft.load is api.load
    assert metapeft.profile is api.profile and metapeft.train_sequence is api.train_sequence
    assert set(metapeft.__all__) <= set(dir(metapeft))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert metapeft.__version__ == declared
    with pytest.raises(AttributeError, match="guess"):
        metapeft.guess  # noqa: B018


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each kind, trained for two steps."""
    from metapeft import backbones
    from metapeft.data import load_task
    from metapeft.training.session import Session
    from metapeft.training.trainer import run_trial

    folder = tmp_path_factory.mktemp("trained")
    task = load_task(spam_file(folder), DataSettings(max_train=16, max_validation=8, max_test=8))
    session = Session(backbones.load(str(tiny_folder("llama"))), task)
    for method in ("lora", "prompt", "prefix"):
        run_trial(session, {"method": method, "batch_size": 4}, steps=2, folder=folder / method)
    return {method: folder / method for method in ("lora", "prompt", "prefix")}


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_a_loaded_model_gives_logits_of_the_real_tokens_and_generates(method: str, trained: dict[str, Path]) -> None:
    from mlx_lm import generate

    from metapeft.runtime import mx

    backbone = str(tiny_folder("llama"))
    plain, tokenizer = metapeft.load(backbone)
    model, _ = metapeft.load(backbone, adapter=trained[method])
    ids = mx.array([tokenizer.encode("free prize"), tokenizer.encode("see you at")])
    logits = model(ids)
    assert logits.shape == (2, ids.shape[1], plain(ids).shape[-1])
    assert not mx.allclose(logits, plain(ids), atol=1e-4), "the adapter does something"
    assert isinstance(generate(model, tokenizer, "free prize", max_tokens=4), str)
    one = model(ids[:1])
    assert mx.allclose(one, logits[:1], atol=1e-4), "rows of a batch do not mix"


def test_a_task_has_one_work_folder_per_backbone_and_data_settings(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = spam_file(tmp_path)

    def folder(task: str, **given: Any) -> Path:
        return api.work_folder(load_settings(None, task=task, **given))

    assert folder("spam.jsonl") == folder(str(path)) == folder("./spam.jsonl")
    others = [folder("sms_spam"), folder(str(path), backbone="x"), folder(str(path), data={"seed": 1})]
    assert len({folder(str(path)), *others}) == 4
    assert folder(str(path), train={"steps": 7}, seed=3) == folder(str(path))


@pytest.mark.parametrize("command", ["train", "sweep", "recommend", "profile"])
def test_others_are_kept_out_until_the_results_are_read(command: str, tmp_path: Path, monkeypatch: Any) -> None:
    work, seen = tmp_path / "work", []

    def held() -> bool:
        with ThreadPoolExecutor() as other:
            lock = FileLock(work / ".stages" / "pipeline.lock")
            return isinstance(other.submit(lock.acquire, timeout=0).exception(), Timeout)

    name = {"train": "metapeft.api.read_trial", "sweep": "metapeft.api.read_sweep"}.get(command)
    name = name or {"recommend": "metapeft.stages.recommend.ranked", "profile": "metapeft.api.read_json"}[command]
    module, function = name.rsplit(".", 1)
    read = getattr(import_module(module), function)
    monkeypatch.setattr(name, lambda *arguments: (seen.append(held()), read(*arguments))[1])
    params = tmp_path / "params.yaml"
    params.write_text(
        "data: {max_train: 24, max_validation: 8, max_test: 16}\nsweep: {trials: 1, steps: 1}\ntrain: {steps: 1}\n"
    )
    found = getattr(api, command)(spam_file(tmp_path), backbone=str(tiny_folder("llama")), work=work, params=params)
    assert found is not None and seen and all(seen) and not held()


def test_settings_come_from_the_folders_params_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("seed: 5\nsweep: {trials: 3, steps: 7}\n")
    found = api.settings_for("t", sweep={"trials": None, "steps": 9}, seed=None)
    assert (found.seed, found.sweep.trials, found.sweep.steps) == (5, 3, 9)
