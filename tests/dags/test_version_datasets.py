"""The DAG that puts task files under DVC, run in a project of its own: a Git and DVC repository with a remote."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from metapeft.data import versions
from tests.dags.conftest import run
from tests.stages.made import spam_file, spam_rows


def states(project: Path, logical_date: datetime | None = None) -> list[tuple[str, int, str]]:
    """Of the tasks of one run; logical_date: of a day that is filled in."""
    found = run(project, "version_datasets", logical_date=logical_date)
    return sorted((task, part, state) for (task, part), (state, _) in found.items())


def events() -> list[dict[str, Any]]:
    """What the asset `datasets` was updated with, oldest first."""
    from airflow.models.asset import AssetEvent, AssetModel
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        query = select(AssetEvent.extra).join(AssetModel, AssetModel.id == AssetEvent.asset_id)
        return list(session.scalars(query.where(AssetModel.name == "datasets").order_by(AssetEvent.id)))


def test_a_broken_file_fails_at_once(airflow_home: Path, project: Path) -> None:
    (project / "data" / "broken.csv").write_text("text,label\nonly one,row\n")
    assert run(project, "version_datasets")["version", 0] == ("failed", 1), "wrong input must not be tried again"
    assert not (project / "data/broken.csv.dvc").exists()


@pytest.mark.slow
def test_changed_files_are_versioned_broken_ones_fail_alone_and_others_hear_of_it(
    airflow_home: Path, project: Path
) -> None:
    file = spam_file(project / "data")
    (project / "data" / "broken.csv").write_text("text,label\nonly one,row\n")
    before = len(events())
    assert states(project) == [("files", -1, "success"), ("version", 0, "failed"), ("version", 1, "success")]
    identity = versions.tracked(file)
    assert identity == versions.content_id(file) and not (project / "data/broken.csv.dvc").exists()
    (event,) = events()[before:]
    assert event["task"] == "spam" and event["dvc_id"] == identity and event["version"]
    assert (project.parent / "remote/files/md5" / identity[:2] / identity[2:]).exists()

    (project / "data" / "broken.csv").unlink()
    assert states(project) == [("files", -1, "success"), ("version", 0, "skipped")]
    filled = states(project, datetime(2026, 11, 1, tzinfo=UTC))
    assert filled == [("files", -1, "success"), ("version", 0, "skipped")], "a day of the past changes nothing"
    assert len(events()) == before + 1, "nothing new, nothing told"

    file.unlink()
    file.write_text("".join(json.dumps(row) + "\n" for row in spam_rows(90)))
    assert states(project)[1] == ("version", 0, "success")
    assert [e["dvc_id"] for e in events()[before:]] == [identity, versions.tracked(file)]
