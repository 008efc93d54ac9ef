"""Sweeps of these tests share no places with what else trains on this machine."""

from __future__ import annotations

import tempfile

import pytest


@pytest.fixture(autouse=True)
def own_slots(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))  # for the processes that a test starts
    monkeypatch.setattr(tempfile, "tempdir", None)
