"""What aliases mean, without a server: a version that fails is refused, and what was served before stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from metapeft import backbones
from metapeft.backbones import Backbone
from metapeft.peft import folder
from metapeft.serving.engine import Engine, Limits
from metapeft.serving.registry import Registry
from metapeft.settings import load_settings
from metapeft.tracking import models
from tests.backbones.tiny import tiny_folder
from tests.serving.made import register, register_all, save


def broken(where: Path, backbone: Backbone) -> Path:
    """An adapter whose numbers overflow."""
    wild = save(where, backbone, "lora", 1)
    weights = {key: tensor * 1e30 for key, tensor in load_file(wild / "adapter_model.safetensors").items()}
    save_file(weights, wild / "adapter_model.safetensors")
    folder.publish(wild, {p.name: p.read_bytes() for p in wild.iterdir() if p.name != folder.MANIFEST})
    return wild


def test_a_restart_knows_what_a_champion_was_and_undoes_a_promotion_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path))
    shutil.copytree(tiny_folder("llama"), tmp_path / "tiny")
    settings = load_settings(backbone=str(tmp_path / "tiny"))
    backbone = backbones.load(settings.backbone)
    register(settings, save(tmp_path / "good", backbone, "lora", 0), "alpha", "lora", score=0.5)
    engine = Engine(backbone, Limits())
    engine.start()
    try:
        Registry(engine, settings).refresh()
        wild = broken(tmp_path / "wild", backbone)
        register(settings, wild, "alpha", "lora", score=0.9, seed=1)
        assert models.resolve(settings, "task/alpha")[1].version == 2

        restarted = Registry(engine, settings)
        restarted.refresh()
        last = restarted.deployments[-1]
        assert (last.outcome, last.version, last.before) == (
            "refused",
            2,
            1,
        ) and "champion now: version 1" in last.reason
        restarted.refresh()
        served = restarted.resolve("task/alpha")
        assert served is not None and served.model.version == 1
        again = Registry(engine, settings)
        again.refresh()
        assert [d.outcome for d in again.deployments].count("refused") == 1, "a restart takes up what was served"
    finally:
        engine.stop()


def test_two_servers_undo_a_promotion_once_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path))
    shutil.copytree(tiny_folder("llama"), tmp_path / "tiny")
    settings = load_settings(backbone=str(tmp_path / "tiny"))
    backbone = backbones.load(settings.backbone)
    made = [save(tmp_path / "1", backbone, "lora", 0), save(tmp_path / "2", backbone, "lora", 2)]
    register_all(settings, [(made[0], "alpha", "lora", 0.5, 0), (made[1], "alpha", "lora", 0.6, 2)])
    engine = Engine(backbone, Limits())
    engine.start()
    try:
        one, two = Registry(engine, settings), Registry(engine, settings)
        one.refresh()
        two.refresh()
        register(settings, broken(tmp_path / "3", backbone), "alpha", "lora", score=0.9, seed=1)
        seen = models.list_models(settings)  # what the other server saw before the first one acted
        one.refresh()
        assert models.resolve(settings, "task/alpha")[1].version == 2
        with monkeypatch.context() as late:
            late.setattr(models, "list_models", lambda settings: seen)
            two.refresh()
            assert models.resolve(settings, "task/alpha")[1].version == 2, "undone once"
            assert "champion now: version 2" in two.deployments[-1].reason
            models.promote(settings, "alpha", 1)
            two._failed.clear()
            two.refresh()
        assert models.resolve(settings, "task/alpha")[1].version == 1, "what a person promoted meanwhile stays"
    finally:
        engine.stop()
