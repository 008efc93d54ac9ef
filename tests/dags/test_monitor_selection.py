"""The DAG that watches the advice, run by Airflow: a new alert updates the asset that starts retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dags.conftest import ROOT
from tests.monitoring import made


def run() -> dict[str, str]:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(ROOT / "dags"))
    done = bag.dags["monitor_selection"].test()
    return {ti.task_id: str(ti.state) for ti in done.get_task_instances()}


def events() -> list[dict[str, Any]]:
    from airflow.models.asset import AssetEvent, AssetModel
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        query = select(AssetEvent.extra).join(AssetModel, AssetModel.id == AssetEvent.asset_id)
        return list(session.scalars(query.where(AssetModel.name == "degraded").order_by(AssetEvent.id)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_new_alert_updates_the_asset_and_an_old_one_does_not(airflow_home: Path) -> None:
    before = len(events())
    made.settle()
    made.live([*made.steps(30), *made.steps(50, broken=True, start=30)])
    assert run() == {"monitor": "success", "degraded": "success"}
    (event,) = events()[before:]
    assert set(event["alerts"]) & {"regret", "order"} and event["since"]
    assert run() == {"monitor": "success", "degraded": "skipped"}, "told before"
    assert len(events()) == before + 1


@pytest.mark.timeout(1200)
def test_where_nothing_was_advised_yet_nothing_is_degraded(airflow_home: Path) -> None:
    before = len(events())
    assert run() == {"monitor": "success", "degraded": "skipped"}
    assert len(events()) == before
