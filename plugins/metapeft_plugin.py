"""Tells Airflow about metapeft: the link from a task of the pipeline to its MLflow run."""

from __future__ import annotations

from typing import ClassVar

from airflow.sdk.bases.operatorlink import BaseOperatorLink
from airflow.sdk.plugins_manager import AirflowPlugin

from metapeft.airflow.links import MLflowRunLink


class MetapeftPlugin(AirflowPlugin):
    name = "metapeft"
    operator_extra_links: ClassVar[list[BaseOperatorLink]] = [MLflowRunLink()]
