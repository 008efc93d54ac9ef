"""Tells people: a task failed for good, or a run is late.

Where METAPEFT_ALERT_URL is set (a chat's incoming webhook, or any service that takes {"text": …} by POST) the message
goes there; it stands in the task log in any case. A notification that cannot be delivered never fails a task.

Callbacks belong to tasks, not to DAGs: a callback of a DAG breaks `airflow dags test`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
from collections.abc import Mapping
from typing import Any
from urllib.request import Request, urlopen

URL = "METAPEFT_ALERT_URL"
SECONDS = 10
log = logging.getLogger(__name__)


def failed(context: Mapping[str, Any]) -> None:
    """`on_failure_callback` of a task: its retries are used up, or its input was wrong."""
    ti = context.get("task_instance") or context.get("ti")
    where = f"{ti.dag_id}.{ti.task_id}, run {ti.run_id}" if ti is not None else "a task"
    index = getattr(ti, "map_index", -1)
    place = where if index is None or index < 0 else f"{where}, part {index}"
    reason = " ".join(str(context.get("exception") or "no reason given").split())
    send(f"metapeft: {place} failed: {reason}", getattr(ti, "log_url", "") or "")


def degraded(context: Mapping[str, Any]) -> None:
    """`on_success_callback` of the task that found the advice worse. Writes the alerts into its log; `metapeft monitor`
    has posted them already, once."""
    ti = context.get("task_instance") or context.get("ti")
    found = ti.xcom_pull(task_ids=ti.task_id) if ti is not None else None
    for alert in (found or {}).get("alerts", ()):
        log.error("metapeft: %s. %s What to do: %s", alert["title"], alert["text"], alert["do"])


async def late(context: Mapping[str, Any] | None = None, **_: Any) -> None:
    """Callback of a missed deadline; runs in the triggerer, so it must not block it."""
    run = (context or {}).get("dag_run") or {}
    message = f"metapeft: {run.get('dag_id', 'a run')}, run {run.get('dag_run_id', '?')} is later than it should be"
    await asyncio.to_thread(send, message)


def send(message: str, link: str = "") -> bool:
    """Logs the message and posts it; whether it was delivered."""
    log.error("%s", message)
    url = os.environ.get(URL)
    if not url:
        return False
    body = json.dumps({"text": f"{message} {link}".strip()}).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=SECONDS):  # http(s), by an admin
            return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        log.warning("the alert could not be delivered to %s: %s", URL, error)
        return False
