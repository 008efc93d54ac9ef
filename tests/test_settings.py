"""What settings' helpers promise."""

from __future__ import annotations

import pytest

from metapeft.settings import shown


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
