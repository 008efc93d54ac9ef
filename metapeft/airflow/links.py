"""The button that leads from a task in Airflow to its run in MLflow."""

from __future__ import annotations

from typing import Any

from airflow.sdk.bases.operatorlink import BaseOperatorLink


class MLflowRunLink(BaseOperatorLink):
    """Shown where the tracking server has an address that a browser can open (a SQLite file has none)."""

    name = "MLflow run"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        return str(getattr(operator, "run_url", ""))
