"""`metapeft meta …` from the command line, on an experience with a known truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metapeft import cli
from metapeft.meta import versions
from metapeft.meta.experience import Experience
from metapeft.meta.knowledge import knowledge
from metapeft.profiling import cache
from tests.meta.made import CONTENT, profile, trial
from tests.meta.synthetic import world


@pytest.fixture
def grown(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The truth is known of these tasks alone: nothing that ships beneath them.
    monkeypatch.setattr(Experience.__init__, "__defaults__", (None, None))
    found = world(14, filled=0.5)
    Experience().extend(found.trials)
    for (version, _), features in found.features.items():
        known = profile()
        known = replace(known, task_version=version, features={**known.features, **features})
        cache.write(home / "profiles" / f"{version}-accuracy-{CONTENT}-1.json", known.to_json())
    return home


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert cli.main(["meta", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_writes_table_and_pictures(grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "evaluate", "--no-curve", "--output", str(tmp_path / "out"))
    assert {"name", "value", "target", "met"} == set(found["targets"][0])
    assert {"single best configuration", "random", "oracle", "metapeft"} <= {s["selector"] for s in found["selectors"]}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(found["files"])
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in found["files"])
    assert "| metapeft |" in (tmp_path / "out" / "evaluation.md").read_text()
    assert cli.main(["meta", "evaluate", "--no-curve"]) == 0
    assert "remaining gap" in capsys.readouterr().out


def test_train_versions_promote_rollback(grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = printed(capsys, "train")
    assert trained["version"] == 1 and isinstance(trained["promoted"], bool) and trained["tasks"] == 14
    assert [v["number"] for v in printed(capsys, "versions")] == [0, 1]
    assert printed(capsys, "promote", "1") == {"champion": 1} and versions.champion().number == 1
    assert printed(capsys, "rollback") == {"champion": 0}
    assert cli.main(["meta", "promote", "9"]) == 2 and "no readable version 9" in capsys.readouterr().err


def test_what_is_known_follows_the_files(grown: Path) -> None:
    before = knowledge()
    assert knowledge() is before and all(o.task.features is not None for o in before.observations())
    Experience().append(trial(0.9, "brand new"))
    after = knowledge()
    assert len(after.trials) == len(before.trials) + 1
    assert {o.task.name for o in after.observations()} - {o.task.name for o in before.observations()} == {"brand new"}
