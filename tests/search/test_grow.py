"""Growing the experience: nothing twice, nothing lost, in the time that was given."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metapeft.errors import MetapeftError, UserError
from metapeft.meta import library
from metapeft.meta.experience import Experience
from metapeft.training import trainer
from metapeft.training.trial import Trial
from tests.backbones.tiny import tiny_folder, write
from tests.search.growing import ROWS, grown
from tests.stages.made import spam_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> str:
    return str(tiny_folder("llama"))


def recorded(home: Path) -> list[str]:
    """Every id as often as it was written."""
    lines = [line for path in (home / "experience" / "segments").glob("*.jsonl") for line in path.open()]
    return [json.loads(line)["id"] for line in lines]


def place(trial: Trial) -> tuple[str, str]:
    return trial.task_version, trial.method


def start(model: str, trials: int = 1000) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.search.growing", model, str(trials)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def test_a_task_is_grown_once_at_both_sizes(model: str, home: Path) -> None:
    seen: list[Trial] = []
    first = grown(model, ["t1"], on_trial=lambda _, trial: seen.append(trial))
    trials = Experience(shipped=None).trials()
    assert first.complete and not first.skipped and first.trials == first.cells == 2 * len(ROWS)
    assert {t.id for t in trials} == {t.id for t in seen} and len(recorded(home)) == len(trials)
    assert {t.train_examples for t in trials} == {10, 40}
    assert all(t.status in ("ok", "diverged") and t.untuned_score for t in trials)
    assert sum(t.status == "ok" for t in trials) >= len(ROWS)
    assert all(t.score and t.adapter_bytes > 0 and t.adapter == "" and t.curve for t in trials if t.status == "ok")
    assert all(t.profile_version and t.budget == 3 for t in trials)
    assert len(list((home / "profiles").glob("*.json"))) == 2
    assert list((home / "growing").iterdir()) == []
    kept = library.entries()
    assert {(e.trial.task_version, e.trial.method) for e in kept} == {
        (t.task_version, t.method) for t in trials if t.status == "ok"
    }
    for entry in kept:
        same = [t for t in trials if (t.task_version, t.method, t.status) == (*place(entry.trial), "ok")]
        assert entry.worth == max(library.worth(t, t.adapter_bytes // 2) for t in same) and entry.read().tensors
    again = grown(model, ["t1"])
    assert again.complete and again.trials == 0 and again.known == first.cells


def test_a_file_is_grown_too(model: str, tmp_path: Path) -> None:
    from metapeft.data import load_task

    found = grown(model, [str(spam_file(tmp_path))], load=load_task, max_trials=2)
    assert found.trials == 2 and found.tasks == ["spam"]


def test_trials_are_as_many_as_asked_for_and_unusable_tasks_are_left_out(model: str) -> None:
    found = grown(model, ["nonsense", "t3"], max_trials=3)
    assert found.trials == 3 and not found.complete and found.skipped == {"nonsense": "no task nonsense"}
    assert len(Experience(shipped=None).trials()) == 3
    with pytest.raises(UserError, match="no task nonsense"):
        grown(model, ["nonsense"])


def test_every_fourth_task_is_repeated_with_another_seed(model: str) -> None:
    found = grown(model, ["t1", "t2"])
    trials = [t for t in Experience(shipped=None).trials() if t.task == "t2"]
    assert found.complete and {t.seed for t in trials} == {0, 1}
    pairs = {json.dumps(t.configuration, sort_keys=True): {t.seed for t in trials} for t in trials}
    assert len(pairs) == len(ROWS) and all(seeds == {0, 1} for seeds in pairs.values())


def test_time_is_kept(model: str) -> None:
    begin = time.monotonic()
    found = grown(model, ["t1", "t2"], max_seconds=4.0)
    assert not found.complete and time.monotonic() - begin < 15.0
    assert grown(model, ["t1", "t2"], max_seconds=0.0).trials == 0


def test_broken_trials_are_kept_and_too_many_end_it(model: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.run_trial

    def breaks(session: object, configuration: dict[str, object], **options: object) -> Trial:
        if configuration["method"] == "prefix" or everything:
            raise RuntimeError("kaputt")
        return real(session, configuration, **options)  # type: ignore[arg-type]

    everything = False
    monkeypatch.setattr(trainer, "run_trial", breaks)
    found = grown(model, ["t1"], max_trials=6)
    failed = [t for t in Experience(shipped=None).trials() if t.status == "failed"]
    assert found.trials == 6 and found.statuses["failed"] == len(failed) > 0
    assert all(t.method == "prefix" and "kaputt" in t.error and t.device for t in failed)
    everything = True
    with pytest.raises(MetapeftError, match=r"4 trials failed in a row.*kaputt"):
        grown(model, ["t1"])
    assert len(set(recorded(home))) == len(recorded(home)) == 10


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_says_what_was_done(model: str, home: Path, stop: signal.Signals) -> None:
    child = start(model)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(3)]
    child.send_signal(stop)
    last = child.communicate(timeout=60)[0].splitlines()[-1]
    assert child.returncode == 0 and last.split()[0] == "interrupted"
    assert int(last.split()[1]) == len(recorded(home)) >= sum(line.startswith("trial") for line in lines)


def test_killed_at_any_moment_it_goes_on(model: str, home: Path) -> None:
    said: set[str] = set()
    for lines in (2, 4):
        child = start(model)
        assert child.stdout is not None
        for _ in range(lines):
            said |= {word for word in child.stdout.readline().split()[1:2] if word}
        child.kill()
        child.wait()
        assert said <= set(recorded(home))
    found = grown(model, ["t1", "t2"], max_trials=3)
    assert found.known >= len(said) and found.trials == 3
    assert len(recorded(home)) == len(set(recorded(home)))  # nothing was run twice, nothing stays claimed
    assert not list((home / "growing").iterdir())


def test_two_growers_share_the_work(model: str, home: Path) -> None:
    growers = [start(model), start(model)]
    counts = []
    for grower in growers:
        out = grower.communicate(timeout=240)[0].splitlines()
        assert grower.returncode == 0 and out[-1].startswith("end")
        counts.append(int(out[-1].split()[1]))
    assert min(counts) > 0 and sum(counts) == len(recorded(home)) == len(set(recorded(home)))
    assert grown(model, ["t1", "t2"]).complete
    assert sum(counts) == len(recorded(home))


def test_a_full_disk_is_no_trial(model: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[dict[str, object]] = []

    def full(session: object, configuration: dict[str, object], **options: object) -> Trial:
        began.append(configuration)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(trainer, "run_trial", full)
        grown(model, ["t1"])
    assert Experience(shipped=None).trials() == [] and recorded(home) == []
    assert grown(model, ["t1"], max_trials=1).trials == 1
    (trial,) = Experience(shipped=None).trials()
    assert [trial.configuration] == began and trial.status in ("ok", "diverged")


def test_other_weights_in_the_same_folder_are_another_backbone(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    folder.mkdir()
    measured = {}
    for seed in (0, 5):
        write(folder, "llama", seed)
        grown(str(folder), ["t1"], max_trials=1)
        trials = Experience(shipped=None).trials()
        assert all(trial.untuned_score for trial in trials)
        measured |= {trial.id: trial.untuned_score for trial in trials}
    first, second = measured.values()
    assert first != second


def test_a_killed_growth_leaves_no_adapter_that_was_recorded(model: str, home: Path) -> None:
    grown(model, ["t1"], max_trials=1)
    (done,) = recorded(home)
    (home / "growing" / done).mkdir()
    grown(model, ["t1"], max_trials=1)
    assert list((home / "growing").iterdir()) == [] and len(recorded(home)) == 2


def test_a_method_that_the_backbone_does_not_take_is_not_planned() -> None:
    with_prefix = grown(str(tiny_folder("llama")), ["t1"], max_trials=1).cells
    without = grown(str(tiny_folder("minicpm3")), ["t1"]).statuses
    assert sum(without.values()) < with_prefix and set(without) <= {"ok", "diverged"}
