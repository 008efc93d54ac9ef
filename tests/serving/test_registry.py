"""What aliases mean, without a server: a version that fails is refused, and what was served before stays."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load_file, save_file

from metapeft import backbones
from metapeft.backbones import Backbone
from metapeft.peft import checkpoints, folder
from metapeft.serving import registry as serving_registry
from metapeft.serving.app import Service, create_app
from metapeft.serving.engine import Engine, Limits, Unavailable
from metapeft.serving.keys import Keyring
from metapeft.serving.metrics import Metrics
from metapeft.serving.registry import Registry, UnknownModel
from metapeft.serving.select import Selector
from metapeft.settings import Settings, load_settings
from metapeft.tracking import models
from metapeft.tracking.client import connect
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


@dataclass(frozen=True)
class Place:
    """A METAPEFT_HOME with three adapters, and an engine that keeps none of them longer than it must."""

    home: Path
    settings: Settings
    engine: Engine

    @contextmanager
    def away(self) -> Iterator[None]:
        """While all files of adapters are."""
        (self.home / "mlartifacts").rename(self.home / "away")
        try:
            yield
        finally:
            (self.home / "away").rename(self.home / "mlartifacts")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_folder("llama"), home / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(home))
        settings = load_settings(backbone=str(home / "tiny"))
        backbone = backbones.load(settings.backbone)
        made = ["alpha", "beta", "mails@2024"]
        register_all(
            settings,
            [(save(home / "made" / name, backbone, "lora", n), name, "lora", 0.5, n) for n, name in enumerate(made)],
        )
        engine = Engine(backbone, Limits(adapter_mb=0))
        engine.start()
        yield Place(home, settings, engine)
        engine.stop()


@pytest.fixture
def at_home(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("METAPEFT_HOME", str(place.home))
    return place


def number(registry: Registry, id: str) -> int:
    version = registry.resolve(id)
    assert version is not None
    return version.model.version


def test_files_that_are_away_for_a_while_make_no_version_bad(at_home: Place) -> None:
    registry = Registry(at_home.engine, at_home.settings)
    with at_home.away():
        registry.refresh()
        registry.refresh()
        for id in ("task/alpha", "task/alpha@1"):
            with pytest.raises(Unavailable) as failed:
                registry.resolve(id)
            assert str(at_home.home) not in str(failed.value)
        assert [d.outcome for d in registry.deployments if d.task == "alpha"] == ["postponed"], "remembered once"
    registry.refresh()
    assert number(registry, "task/alpha") == 1
    assert [d.outcome for d in registry.deployments if d.task == "alpha"] == ["postponed", "deployed"]


def test_a_promotion_that_cannot_be_looked_at_is_not_undone(at_home: Place) -> None:
    registry = Registry(at_home.engine, at_home.settings)
    registry.refresh()
    better = save(at_home.home / "better", at_home.engine.backbone, "lora", 5)
    register(at_home.settings, better, "beta", "lora", score=0.9, seed=5)
    champion = models.resolve(at_home.settings, "task/beta")[0]
    weights = champion / "adapter_model.safetensors"
    for harm in (at_home.away(), moved(weights), moved(champion / "manifest.json"), replaced(weights)):
        with harm:
            registry.refresh()
            assert number(registry, "task/beta") == 1, "what was served still is"
        assert models.resolve(at_home.settings, "task/beta")[1].version == 2
    assert registry.deployments[-1].outcome == "postponed"
    registry.refresh()
    assert number(registry, "task/beta") == 2


@contextmanager
def moved(path: Path) -> Iterator[None]:
    path.rename(path.with_name("elsewhere"))
    try:
        yield
    finally:
        path.with_name("elsewhere").rename(path)


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """By what cannot be read as a file."""
    with moved(path):
        path.mkdir()
        try:
            yield
        finally:
            path.rmdir()


def test_what_could_not_be_looked_at_is_tried_again_soon(at_home: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_registry, "RETRY_SECONDS", 0.1)
    for seconds in (3600.0, math.inf, math.nan):
        registry = Registry(at_home.engine, at_home.settings, seconds)
        with at_home.away():
            registry.start()
            assert registry.ready.wait(60)
        for _ in range(3):  # what is noticed is looked at, also after it has waited for the next look
            until = time.monotonic() + 30
            while len(registry.served) < 3:
                assert time.monotonic() < until
                time.sleep(0.02)
            registry.served.clear()
            registry.notice()
        registry.stop()
        assert not registry._thread.is_alive()


def test_the_name_of_a_task_may_hold_an_at_sign(at_home: Place) -> None:
    registry = Registry(at_home.engine, at_home.settings)
    registry.refresh()
    ids = [id for id, _ in registry.ids() if "mails" in id]
    assert sorted(ids) == ["task/mails@2024@1", "task/mails@2024@champion"]
    assert [number(registry, id) for id in ("task/mails@2024", "mails@2024", *ids)] == [1] * 4
    for id in ("task/mails", "task/mails@2023", "task/mails@2024@2", "@2024"):
        with pytest.raises(UnknownModel):
            registry.resolve(id)


def test_faults_of_the_server_are_its_own_and_tell_no_path(at_home: Place) -> None:
    registry = Registry(at_home.engine, at_home.settings)
    registry.refresh()
    registry.ready.set()
    selector, keyring, metrics = Selector(at_home.settings.backbone), Keyring(), Metrics(at_home.engine, registry)
    log: list[dict[str, Any]] = []
    service = Service(at_home.engine, registry, selector, keyring, metrics, log.append)
    client = TestClient(create_app(service), base_url="http://localhost")

    def ask(model: str) -> Any:
        return client.post("/v1/completions", json={"model": model, "prompt": "abc", "max_tokens": 1})

    def fault(answer: Any, words: str) -> None:
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"
        assert str(at_home.home) not in answer.text
        assert words in log[-1]["error"] and log[-1]["status"] == 503

    assert ask("task/mails@2024").status_code == 200
    with at_home.away():
        fault(ask("task/alpha"), "no adapter folder")
        fault(client.post("/v1/classify", json={"model": "task/alpha", "input": "x"}), "no adapter folder")
        registry._versions.clear()  # as of a version that was not asked for yet
        fault(ask("task/alpha@1"), "are gone from")
        assert client.get("/v1/models/task/alpha@1").status_code == 200
    weights = models.resolve(at_home.settings, "task/alpha")[0] / "adapter_model.safetensors"
    whole = weights.read_bytes()
    assert ask("task/alpha").status_code == 200 and ask("task/mails@2024").status_code == 200
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fault(ask("task/alpha"), "differs from its manifest")
    weights.write_bytes(whole)
    assert ask("task/alpha").status_code == 200
    feedback = at_home.home / "serving" / "feedback.jsonl"
    feedback.mkdir()
    fault(client.post("/v1/feedback", json={"model": "task/alpha", "rating": "right"}), "cannot write")
    feedback.rmdir()
    assert ask("task/nobody").status_code == 404 and "error" not in log[-1]
    assert ask("task/alpha@9").status_code == 404


def test_before_the_registry_was_looked_at_no_adapter_is_called_unknown(
    at_home: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(at_home.engine, at_home.settings)
    for id in ("task/alpha", "task/never"):
        with pytest.raises(Unavailable, match="try again"):
            registry.find(id)
    assert registry.find(at_home.engine.name) is None
    registry.refresh()
    assert number(registry, "task/alpha") == 1
    with pytest.raises(UnknownModel):
        registry.find("task/never")


def test_a_number_that_is_given_out_again_is_another_version(at_home: Place) -> None:
    registry = Registry(at_home.engine, at_home.settings)
    backbone = at_home.engine.backbone
    for seed in (11, 12):
        made = save(at_home.home / f"again{seed}", backbone, "lora", seed)
        register(at_home.settings, made, "again", "lora")
        registry.refresh()
        version = registry.resolve("task/again@1")
        assert version is not None and version.model.version == 1
        assert models.weights_digest(version.folder) == models.weights_digest(at_home.home / f"again{seed}")
        held = at_home.engine.call(lambda version=version: at_home.engine.load(version)).result()
        assert held is not None
        connect(at_home.settings.tracking).delete_registered_model(version.model.name)


def test_a_deployment_may_be_asked_for_by_the_id_of_requests(at_home: Place) -> None:
    registry = Registry(at_home.engine, at_home.settings)
    registry.refresh()
    key = next(key for key in registry.served if "alpha" in key[0])
    for name in (None, key[0], "task/alpha", "alpha", "task/alpha@champion", "task/alpha@1"):
        registry._failed[key] = ("", 0, "", 0)
        registry.notice("task/beta")
        assert key in registry._failed
        registry.notice(name)
        assert key not in registry._failed, name


def test_a_backbones_folder_is_the_same_however_it_is_written(at_home: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(at_home.home)
    place = str(at_home.home / "tiny")
    assert serving_registry.same_backbone("./tiny", place) and serving_registry.same_backbone("tiny", "tiny")
    assert not serving_registry.same_backbone(str(at_home.home), place)
    assert not serving_registry.same_backbone("some-model", place)


def test_virtual_tokens_take_places(at_home: Place) -> None:
    backbone = at_home.engine.backbone
    for method, tokens in (("lora", 0), ("prompt", 5), ("prefix", 3), ("p_tuning", 4)):
        folder = save(at_home.home / "made" / f"virtual-{method}", backbone, method)
        assert serving_registry.virtual_tokens(checkpoints.read(folder)) == tokens
