"""What the page is told, without a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from metapeft.serving.overview import best_methods, decided, profiles, task_map
from tests.serving.made import trial


def test_decisions_show_what_became_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path))
    first, second = trial("tiny", "a", "lora", 0.7, 0), trial("tiny", "a", "prefix", 0.9, 0)
    interval = {"mean": 0.6, "low": 0.5, "high": 0.8, "level": 0.9}
    entry = {"id": "x", "at": "2026-05-01T10:00:00.000000+00:00", "task": "a", "task_version": first.task_version}
    entry |= {"backbone": "tiny", "model": 0, "basis": "experience"}
    recommended = {"rank": 1, "method": "lora", "configuration": first.configuration, "p_best": 0.4}
    entry |= {"recommendations": [recommended | {"score": interval, "likely": interval}]}
    other = entry | {"id": "y", "backbone": "another"}
    (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (entry, other)))
    later = [replace(t, started="2026-05-02T10:00:00") for t in (first, second)]
    (found,) = decided("tiny", later)
    assert (found["method"], found["tried"], found["best"]) == ("lora", 1, 0.9)
    assert found["regret"] == pytest.approx(0.2)
    (waiting,) = decided("tiny", [])
    assert (waiting["tried"], waiting["best"], waiting["regret"]) == (0, None, None)


def test_a_fresh_installation_shows_the_tasks_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metapeft.backbones import packaged
    from metapeft.meta.knowledge import knowledge

    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path))
    known = profiles(packaged.content_id("smollm2-135m-instruct"))
    places = task_map(known, {}, best_methods(knowledge().trials))
    assert len(places) >= 10 and len({p["task"] for p in places}) == len(places)
    assert all(p["method"] is None for p in places) and any(p["best"] for p in places)
