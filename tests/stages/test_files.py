"""A task written by one stage is the same task for the next one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.data.task import Example, Task
from metapeft.errors import UserError
from metapeft.settings import Settings
from metapeft.stages.files import current_sweep, read_task, read_trials, write_csv, write_task, write_trials
from metapeft.stages.stage import write_json
from metapeft.training.trial import Score, Trial

text = st.text(
    st.characters(codec="utf-8"), max_size=30
)  # with U+2028 and friends: not every line separator ends a row
prompt = text | st.lists(st.tuples(st.sampled_from(["system", "user"]), text), min_size=1, max_size=3).map(tuple)
examples = st.lists(st.builds(Example, prompt, text), max_size=4).map(tuple)


@given(examples, examples, examples, st.lists(text, max_size=3).map(tuple), text)
@settings(max_examples=100, deadline=None)
def test_round_trip(train: tuple, validation: tuple, test: tuple, labels: tuple, note: str) -> None:
    task = Task(
        "t", "0" * 16, "classification", "accuracy", train, validation, test, labels, notes=(note,), dvc_id="ab"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_task(task, Path(folder))
        assert read_task(Path(folder)) == task


def test_a_broken_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.json"):
        read_task(tmp_path)
    write_task(Task("t", "0" * 16, "generation", "exact_match", (), (), ()), tmp_path)
    (tmp_path / "data.jsonl").write_text('{"split": "train"}\n')
    with pytest.raises(UserError, match="version stage again"):
        read_task(tmp_path)


def test_a_sweep_counts_for_its_data_and_backbone_alone(tmp_path: Path) -> None:
    wanted = Settings(backbone="some/backbone")
    assert current_sweep(wanted, tmp_path) is None
    write_task(Task("t", "0" * 16, "generation", "exact_match", (), (), ()), tmp_path / "version")
    write_json(tmp_path / "sweep/sweep.json", {"task_version": "0" * 16, "backbone": "some/backbone"})
    assert current_sweep(wanted, tmp_path) is not None
    assert current_sweep(Settings(backbone="other/backbone"), tmp_path) is None
    write_task(Task("t", "1" * 16, "generation", "exact_match", (), (), ()), tmp_path / "version")
    assert current_sweep(wanted, tmp_path) is None


def test_trials_round_trip(tmp_path: Path) -> None:
    score = Score("accuracy", 0.5, 0.01, 10, 1.0)
    trials = [
        Trial("a", "t", "v", "b", "lora", {"rank": 8}, 0, 10, "ok", score, score, None, curve=[{"step": 1}]),
        Trial("b", "t", "v", "b", "prompt", {}, 0, 10, "diverged", error="line\u2028break"),
    ]
    write_trials(trials, tmp_path / "trials.jsonl")
    assert read_trials(tmp_path / "trials.jsonl") == trials


def test_csv_leaves_unknown_values_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"step": 1, "loss": None, "other": 3}, {"step": 2, "loss": 0.5}], ["step", "loss"])
    assert (tmp_path / "a.csv").read_text() == "step,loss\n1,\n2,0.5\n"
