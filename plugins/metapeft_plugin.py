"""Tells Airflow about metapeft: the link from a task to its MLflow run, and the pools that the DAGs need."""

from __future__ import annotations

from typing import Any, ClassVar

from airflow.sdk.bases.operatorlink import BaseOperatorLink
from airflow.sdk.plugins_manager import AirflowPlugin

from metapeft.airflow import pools
from metapeft.airflow.links import MLflowRunLink


class MetapeftPlugin(AirflowPlugin):
    name = "metapeft"
    operator_extra_links: ClassVar[list[BaseOperatorLink]] = [MLflowRunLink()]
    listeners: ClassVar[list[Any]] = [pools]
