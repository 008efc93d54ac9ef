"""Any stage run again, in any order, after losing its output, or twice at the same moment: the end is the same."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metapeft import stages
from metapeft.errors import UserError
from metapeft.meta.experience import Experience
from metapeft.settings import Settings, load_settings
from metapeft.stages.stage import content, read_json
from metapeft.tracking.compare import compare
from metapeft.tracking.models import list_models
from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file

ROOT = Path(__file__).resolve().parents[2]


def small(folder: Path) -> Settings:
    sizes: dict[str, Any] = {"sweep": {"trials": 3, "steps": 2}, "train": {"steps": 3}}
    return load_settings(task=str(spam_file(folder)), backbone=str(tiny_folder("llama")), **sizes)


def end_state(settings: Settings, work: Path) -> dict[str, Any]:
    """What a pipeline leaves for others: models, experience, runs, scores. Not how long it took."""
    models = [(m.name, m.version, m.aliases, m.trial, m.score, m.dvc_id) for m in list_models(settings)]
    trials = [(t.id, t.status, t.score) for t in Experience(shipped=None).trials()]
    rows = [(row["trial"], row["score"], row["status"]) for row in compare(settings)]
    scores = read_json(work / "evaluate" / "metrics.json")
    return {"models": models, "trials": sorted(trials), "runs": sorted(rows), "tuned": scores["tuned"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path, Path]:
    """A finished pipeline: settings, work folder, home."""
    folder = tmp_path_factory.mktemp("finished")
    settings, work = small(folder), folder / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(folder / "home"))
        stages.run(stages.NAMES, settings, work)
    return settings, work, folder / "home"


def test_stages_run_again_in_any_order_change_nothing(
    finished: tuple[Settings, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, work, home = finished
    monkeypatch.setenv("METAPEFT_HOME", str(home))
    before, state = content(work), end_state(settings, work)
    for seed in range(3):
        order = random.Random(seed).sample(stages.NAMES, len(stages.NAMES))
        for name in order:
            assert stages.get(name).run(settings, work).cached, name
    assert content(work) == before and end_state(settings, work) == state


@pytest.mark.parametrize("lost", ["sweep", "train", "register"])
def test_a_lost_output_is_made_again_and_nothing_counts_twice(
    finished: tuple[Settings, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Also where the stage had done its work and died before its folder was there: that is the same."""
    settings, work, home = finished
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "home"))
    settings = settings.model_copy(
        update={"tracking": settings.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/home/mlflow.db"})}
    )
    stages.run(stages.NAMES, settings, tmp_path / "work")  # the store has another address: register runs again
    before = end_state(settings, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / lost)
    results = stages.run(stages.NAMES, settings, tmp_path / "work")
    assert not results[lost].cached
    assert end_state(settings, tmp_path / "work") == before


@pytest.fixture
def copied(finished: tuple[Settings, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a copy that a test may damage."""
    shutil.copytree(finished[2], tmp_path / "home", symlinks=True)
    shutil.copytree(finished[1], tmp_path / "work")
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "home"))
    return tmp_path / "work"


def test_the_adapter_of_another_trial_is_refused(finished: tuple[Settings, Path, Path], copied: Path) -> None:
    """Somebody trained with another seed in between."""
    settings = finished[0]
    stages.get("train").run(settings.model_copy(update={"seed": 1}), copied)
    with pytest.raises(UserError, match=r"is the adapter of trial \w+, not of \w+; run the stage train again"):
        stages.get("register").run(settings, copied)
    shutil.copy(finished[1] / "train" / "trial.json", copied / "train")
    with pytest.raises(UserError, match="run the stage train again"):
        stages.get("evaluate").run(settings, copied)


def test_an_emptied_registry_gets_the_model_again(finished: tuple[Settings, Path, Path], copied: Path) -> None:
    settings = finished[0]
    assert not stages.run(stages.NAMES, settings, copied)["register"].cached  # the store has another address
    assert stages.run(stages.NAMES, settings, copied)["register"].cached
    (copied.parent / "home" / "mlflow.db").unlink()
    program = (  # MLflow keeps the lost file open in this process
        "import sys; from pathlib import Path; from metapeft import stages; from metapeft.settings import Settings;"
        "from metapeft.tracking.models import list_models; settings = Settings.model_validate_json(sys.argv[1]);"
        "cached = [stages.run(stages.NAMES, settings, Path(sys.argv[2]))['register'].cached for _ in range(2)];"
        "print(cached, len(list_models(settings)))"
    )
    words = [sys.executable, "-c", program, settings.model_dump_json(), str(copied)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[False, True] 1\n"


@pytest.mark.slow
def test_two_pipelines_of_one_task_at_the_same_moment(tmp_path: Path, home: Path) -> None:
    """Real processes with a folder each and one home: they share trials, and register one model."""
    settings = small(tmp_path)
    program = (
        "import sys; from pathlib import Path; from metapeft import stages; from metapeft.settings import Settings;"
        "stages.run(stages.NAMES, Settings.model_validate_json(sys.argv[1]), Path(sys.argv[2]))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, settings.model_dump_json(), str(tmp_path / name)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in both:
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
    one, two = end_state(settings, tmp_path / "one"), end_state(settings, tmp_path / "two")
    assert one == two
    assert len(one["models"]) == 1 and one["models"][0][1] == 1
    ids = [trial[0] for trial in one["trials"]]
    assert len(ids) == len(set(ids)) and {row[0] for row in one["runs"]} == set(ids)
    assert read_json(tmp_path / "one/sweep/sweep.json") == read_json(tmp_path / "two/sweep/sweep.json")
