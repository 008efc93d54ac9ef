"""Pools, made when a part of Airflow that has the database starts: a task whose pool is missing would wait for ever.

`mlx`: trainings and evaluations at the same time, over all workers; METAPEFT_MLX_SLOTS says how many at first (1), the
Airflow UI or `airflow pools set` changes it. `dvc`: one, DVC locks its repository.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from airflow.listeners import hookimpl

MLX, DVC = "mlx", "dvc"
_log = logging.getLogger(__name__)


@hookimpl
def on_starting(component: Any) -> None:
    """Airflow's hook. Task processes, which have no database, are passed by."""
    from airflow.jobs.job import Job

    if isinstance(component, Job):
        ensure()


def mlx_slots() -> int:
    """METAPEFT_MLX_SLOTS; 1 where it is no number: without the pool every training would wait for ever."""
    text = os.environ.get("METAPEFT_MLX_SLOTS") or "1"
    try:
        return max(1, int(text))
    except ValueError:
        _log.warning("METAPEFT_MLX_SLOTS=%s is no number; the pool %s gets one slot", text[:40], MLX)
        return 1


def ensure() -> list[str]:
    """Makes the pools that are missing, and changes none that is there. Returns the new ones."""
    from airflow.models.pool import Pool
    from sqlalchemy.exc import SQLAlchemyError

    wanted = {
        MLX: (mlx_slots(), "Trainings at the same time, over all workers"),
        DVC: (1, "DVC locks its repository: one task at a time"),
    }
    made = []
    for name, (slots, description) in wanted.items():
        try:
            if Pool.get_pool(name) is None:
                Pool.create_or_update_pool(name, slots, description, include_deferred=False)
                made.append(name)
        except SQLAlchemyError:  # another part of Airflow, started at the same moment, was first
            continue
    return made
