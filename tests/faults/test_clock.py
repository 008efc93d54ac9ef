"""The clock jumps, back and forth, between stages and in the middle of them: the pipeline ends as ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from metapeft.peft import folder as folders
from tests.faults.pipeline import STAGES, Pipeline
from tests.faults.zygote import Zygote

pytestmark = pytest.mark.timeout(3600)
LIBRARY = next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@pytest.mark.faults
@pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime: apt-get install faketime")
def test_a_pipeline_through_time(tmp_path: Path, figure: Any) -> None:
    """A year back, ten ahead, to 1999, and two hours ahead again and again while the sweep and the training run."""
    assert LIBRARY is not None
    file = tmp_path / "now"
    file.write_text("+0")
    faked = Zygote(
        LD_PRELOAD=LIBRARY,
        FAKETIME_TIMESTAMP_FILE=str(file),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        DONT_FAKE_MONOTONIC="1",
    )
    jumps = 0
    try:
        (tmp_path / "pipeline").mkdir()
        made = Pipeline(tmp_path / "pipeline", faked)
        made.call("tests.faults.pipeline:make_database")
        for stage, offset in zip(STAGES, ("+0", "-1y", "+10y", "-27y", "+0", "+1d", "-1d", "+3y", "-2y"), strict=True):
            file.write_text(offset)
            running = threading.Event()

            def jump(running: threading.Event = running) -> None:
                nonlocal jumps
                while not running.wait(0.3):
                    jumps += 1
                    file.write_text(f"{'+' if jumps % 2 else '-'}{2 * jumps}h")

            jumping = threading.Thread(target=jump)
            if stage in ("sweep", "train"):
                jumping.start()
            ended = made.run(stage)
            running.set()
            assert ended.code == 0, f"{stage}: {ended.err}"
            again = made.recover(stage)
            assert again.result["code"] == 0 and "unchanged" in again.err, again.err
        found = again.result["after"]
        assert sum(line.startswith("model ") for line in found) == 1
        assert sum(line.endswith(" True") for line in found) >= 2, "tested and final trials count with their scores"
    finally:
        faked.close()
    figure(f"9 stages at 9 times between 1999 and 2036, {jumps} jumps of hours during the sweep and the training")


def test_a_writer_with_a_wrong_clock_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours ahead, it takes what another one is building for what a dead one left; that one builds again."""
    target = tmp_path / "adapter"
    build, done = folders._build, []

    def slow(building: Path, *arguments: Any) -> None:
        build(building, *arguments)
        if not done:
            done.append(building)
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda real=time.time: real() + 7200)
                folders.publish(target, {"a": b"theirs"})

    monkeypatch.setattr(folders, "_build", slow)
    folders.publish(target, {"a": b"ours"})
    assert folders.sealed_files(target) == {"a": b"ours"}
    assert os.listdir(tmp_path) == ["adapter"]


def test_keys_and_deadlines_do_not_follow_the_wall_clock(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metapeft.search.slots import Slots
    from metapeft.serving import keys

    key, _ = keys.create("one", per_minute=2)
    ring = keys.Keyring()
    assert [ring.spend(key) for _ in range(2)] == [0.0, 0.0]
    with Slots(1, home / "slots").place():
        monkeypatch.setattr(time, "time", lambda: 4e9)
        assert ring.spend(key) > 0, "a jump of the clock gives no requests away"
        begin = time.monotonic()
        with Slots(1, home / "slots").place(begin + 0.5) as none:
            assert none is None and 0.4 < time.monotonic() - begin < 30
