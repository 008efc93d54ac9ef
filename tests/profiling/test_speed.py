"""The benchmark of a machine: plausible, kept, and repeated only where it must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from metapeft.backbones import load
from metapeft.profiling import speed
from tests.backbones.tiny import tiny, tiny_folder


def test_speed_is_measured_once_per_machine_and_backbone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny("llama")
    assert speed.read(backbone.content_id) is None
    found = speed.of(backbone)
    for seconds in (found.forward, found.gradient, found.head_forward, found.head_gradient, found.step):
        assert 0 < seconds < 1
    assert found.measured["device"] in ("cpu", "metal", "cuda") and found.measured["workers"] >= 1
    with monkeypatch.context() as patch:
        patch.setattr(speed, "measure", pytest.fail)
        assert speed.of(backbone) == speed.read(backbone.content_id) == found
    with monkeypatch.context() as patch:
        patch.setattr(speed, "_machine", lambda: {"device": "another"})
        assert speed.read(backbone.content_id) is None
    (path,) = (home / "speed").iterdir()
    path.write_text("{")
    assert speed.read(backbone.content_id) is None


def test_gradients_take_longer_than_going_forward() -> None:
    found = speed.measure(tiny("llama"))
    assert found.gradient > found.forward


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "minicpm3"])
def test_a_backbone_that_nothing_has_run_yet_is_measured(architecture: str) -> None:
    """Its lazy constants belong to no thread."""
    assert speed.measure(load(str(tiny_folder(architecture)))).forward > 0
