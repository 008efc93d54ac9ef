"""What ships: public tasks and the plan's rows, whole and small, with a datasheet that says what is in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from metapeft.meta import ship as module
from metapeft.meta import versions
from metapeft.meta.evaluate import LEAST, LEAST_JUDGED
from metapeft.meta.experience import SHIPPED, Experience
from metapeft.meta.fitting import groups
from metapeft.meta.knowledge import knowledge
from metapeft.meta.model import Model
from metapeft.meta.plan import configurations
from metapeft.monitoring import promise
from metapeft.profiling import profiles as profiling
from metapeft.profiling.profiles import Profile
from metapeft.profiling.shapes import shapes
from metapeft.settings import DEFAULT_BACKBONE
from metapeft.training.trial import Score, Trial, trial_id
from tests.backbones.tiny import tiny
from tests.meta.synthetic import world


def grown(task: str, row: int, seed: int = 0, value: float = 0.7, **changes: object) -> Trial:
    configuration = configurations(30)[row]
    trial = Trial(
        id=trial_id(task, f"{task}-v", DEFAULT_BACKBONE, configuration, seed, 40, 600),
        task=task,
        task_version=f"{task}-v",
        backbone=DEFAULT_BACKBONE,
        method=configuration["method"],
        configuration=configuration,
        seed=seed,
        budget=40,
        status="ok",
        score=Score("accuracy", value, 0.03, 300, 0.5),
        validation=Score("accuracy", value, 0.03, 64, 0.5),
        untuned_score=Score("accuracy", 0.4, 0.03, 300, 2.0),
        seconds=20.0,
        adapter="/home/somebody/adapter",
        device="cpu",
        versions={"mlx": "0.32.4", "engine": "abcdef native"},
        started="2026-01-01T00:00:00+00:00",
        train_examples=600,
    )
    return replace(trial, **changes)  # type: ignore[arg-type]


def test_only_the_table_ships(tmp_path: Path) -> None:
    store = Experience(tmp_path / "mine", shipped=None)
    rows = range(len(configurations(30)))
    table = [grown("trec6", row, value=0.5 + row / 100) for row in rows]
    table += [grown("name_gender", 3), grown("name_gender", 3, seed=1, value=0.8)]
    table += [grown("sms_spam", 3, status="diverged", score=None, error="the loss rose\nat /home/somebody")]
    own = replace(grown("trec6", 0), id="own", configuration={**configurations(30)[0], "rank": 3})
    store.extend([*table, grown("my_secret_data", 0), own, grown("trec6", 0, id="other", backbone="another")])

    shipped = module.ship(store, tmp_path / "shipped" / "e.parquet", tmp_path / "profiles", tmp_path / "sheet.md")
    again = Experience(tmp_path / "nothing", shipped=tmp_path / "shipped")
    assert {t.id for t in again.trials()} == {t.id for t in table} == {t.id for t in shipped}
    assert not any("somebody" in json.dumps(t.to_json()) for t in again.trials())

    sheet = (tmp_path / "sheet.md").read_text()
    assert f"{len(table)} trials" in sheet and "on 3 tasks" in sheet and "1 of them with at least 4" in sheet
    assert "| diverged | 1 |" in sheet and "the loss rose" in sheet and "abcdef native" in sheet
    assert "1 configurations on 1 tasks were run with two seeds" in sheet and "is 0.071" in sheet  # 0.1 / sqrt 2
    assert "my_secret_data" not in sheet and "| trec6 | classification |" in sheet
    assert all(line.count("|") == 9 + 5 + 0 for line in sheet.splitlines() if line.startswith("| trec6 "))

    # What was shipped stays, also where only newer trials are at hand.
    more = Experience(tmp_path / "more", shipped=tmp_path / "shipped")
    more.append(grown("trec50", 0))
    assert (
        len(module.ship(more, tmp_path / "e2.parquet", tmp_path / "profiles", tmp_path / "sheet.md")) == len(table) + 1
    )


def test_profiles_ship_with_their_tasks(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = shapes(tiny("llama").model)
    profile = Profile(
        profiling.VERSION, "trec6", "trec6-v", DEFAULT_BACKBONE, "c" * 64, {"x": 1 / 3}, (), (0.1,), sizes
    )
    place = home / "profiles" / f"trec6-v-accuracy-c-{profiling.VERSION}.json"
    place.parent.mkdir()
    place.write_text(json.dumps(profile.to_json()))
    monkeypatch.setattr(profiling, "SHIPPED", tmp_path / "profiles")
    store = Experience(tmp_path / "mine", shipped=None)
    store.append(grown("trec6", 0))
    module.ship(store, tmp_path / "e.parquet", tmp_path / "profiles", tmp_path / "sheet.md")
    place.unlink()
    back = profiling.every_profile()["trec6-v", DEFAULT_BACKBONE]
    assert back.features == {"x": 0.333333} and back.shapes == sizes
    assert "1 of 1 places" in (tmp_path / "sheet.md").read_text()


def test_the_shipped_files_are_small_and_what_they_say() -> None:
    table = SHIPPED / "experience.parquet"
    if not table.exists():
        pytest.skip("no experience ships")
    files = [table, *profiling.SHIPPED.glob("*.json")]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    trials = Experience(Path("nowhere")).trials()
    assert all(t.adapter == "" and t.device and t.versions and t.profile_version for t in trials)
    assert f"{len(trials)} trials of" in module.DOCS.read_text()
    known = profiling.every_profile()
    assert {(t.task_version, t.backbone) for t in trials} <= known.keys()


def test_the_meta_model_that_ships_is_fitted_to_what_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first recommendation on a new machine is that of a fitted model, and the monitor knows what it promised."""
    champion = versions.champion()
    observations = knowledge().observations(champion.model.remaining)
    assert champion.number == 0 and set(champion.seen) == {o.id for o in observations}
    assert champion.tasks == len({g[0].task.name for g in groups(observations)}) and champion.model.reach > 0
    assert champion.model.metric != Model().metric and champion.model.deviations != Model().deviations
    monkeypatch.setattr(promise, "judge", pytest.fail)
    judged = promise.promised(champion, observations).judged
    assert len(judged) == len(groups(observations, LEAST)) and len({j.task for j in judged}) >= LEAST_JUDGED


def test_what_is_fitted_ships_with_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a synthetic experience, small enough to be fitted here."""
    made = world(8, seed=1)
    Experience.write(made.trials, tmp_path / "experience.parquet")
    profiles = {place: Features(features) for place, features in made.features.items()}
    monkeypatch.setattr(profiling, "shipped_profiles", lambda: profiles)
    version = module.fit_shipped(tmp_path)
    assert version.tasks == 8 and version.observations == len(made.observations()) == len(version.seen)
    monkeypatch.setattr(versions, "SHIPPED", tmp_path)
    monkeypatch.setattr(promise, "SHIPPED", tmp_path)
    assert versions.shipped() == version
    observations = module.shipped(tmp_path).observations()
    promise.ship(version, observations, tmp_path / "promise.json")
    monkeypatch.setattr(promise, "judge", pytest.fail)
    assert {j.task for j in promise.promised(version, observations).judged} == {t.task for t in made.trials}


@dataclass(frozen=True)
class Features:
    """As much of a profile as observations are made of."""

    features: dict[str, float]
