"""kill -9 at every point where a stage changes a file: nothing that was promised is lost, and a rerun ends as ever."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.pipeline import STAGES, Pipeline

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
EVERY = int(os.environ.get("METAPEFT_FAULT_EVERY", "1"))  # of the points, every how-manieth


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_point_loses_nothing(pipeline: Pipeline, stage: str, tmp_path: Path, figure: Any) -> None:
    tried, promised, at = 0, 0, 1
    while True:
        pipeline.restore(stage)
        acks = tmp_path / f"acks-{at}"
        ended = pipeline.run(stage, "kill", at, acks)
        if ended.code == 0:
            break
        where = f"point {at} of {stage}: {ended.points[-1]}"
        assert ended.code == -signal.SIGKILL, f"{where}\n{ended.err}"
        given = set(acks.read_text().splitlines()) if acks.exists() else set()
        again = pipeline.recover(stage)
        assert again.code == 0 and again.result["code"] == 0, f"{where}\n{again.err}"
        assert given <= set(again.result["before"]), where
        assert set(again.result["before"]) <= set(again.result["after"]), where
        assert pipeline.outcome(stage) == pipeline.outcomes[stage], where
        left = [path.name for path in pipeline.work.iterdir() if path.name.endswith(".tmp")]
        assert left == [], where
        tried, promised, at = tried + 1, promised + len(given), at + EVERY
    assert tried, "no point was reached"
    figure(f"{stage}: killed at {tried} points, {promised} promises kept")
