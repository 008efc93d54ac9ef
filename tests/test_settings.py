"""What settings' helpers promise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metapeft.errors import UserError
from metapeft.settings import Settings, home, load_settings, shown, user_path


def test_a_section_of_comments_alone_leaves_its_defaults(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(
        "task: trec6\nsweep:\n  # trials: 4\ntrain:\n  steps: 7\n  configuration:\n    # rank: 8\nseed:\n"
    )
    assert load_settings(params) == Settings.model_validate({"task": "trec6", "train": {"steps": 7}})
    assert load_settings(params, sweep={"trials": 3}).sweep.trials == 3
    params.write_text("sweep: 4\n")
    with pytest.raises(UserError, match="setting sweep: "):
        load_settings(params)
    params.write_text("sweep:\n  trails:\n")
    with pytest.raises(UserError, match="did you mean 'trials'"):
        load_settings(params)


def test_a_name_that_is_not_utf_8_is_a_mistake(tmp_path: Path) -> None:
    (path := Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))).write_text("{}")
    with pytest.raises(UserError, match="is no name of a file"):
        user_path(path)


@pytest.mark.parametrize(
    ("address", "printed"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me@host/db"),
        ("postgresql+psycopg://me:sec@ret@host:5432/db", "postgresql+psycopg://me@host:5432/db"),
        ("postgresql://host/db?user=me&password=secret&x=1", "postgresql://host/db?user=me&password=…&x=1"),
        ("neither http://me:secret@a:1/x nor http://b:2/y", "neither http://me@a:1/x nor http://b:2/y"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
    ],
)
def test_passwords_are_not_printed(address: str, printed: str) -> None:
    assert shown(address) == printed


def test_a_mistake_is_said_to_be_where_it_is(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("sweep: {trials: 4}\n")
    with pytest.raises(UserError, match=r"sweep\.trials: .*\(in the given options\)"):
        load_settings(params, sweep={"trials": 0})
    params.write_text("sweep: {trials: 0}\n")
    with pytest.raises(UserError, match=r"sweep\.trials: .*params\.yaml\)"):
        load_settings(params, sweep={"repeats": 1, "trials": None})


def test_an_empty_home_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", "")
    assert home() == Path(".metapeft").absolute()
