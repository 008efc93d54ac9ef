"""Places on this machine, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metapeft.runtime import free_memory_mb
from metapeft.search import slots
from metapeft.search.slots import Slots, resident_mb

TRAIN = """
import sys, time
from pathlib import Path
from metapeft.search.slots import Slots
folder, count, name, seconds, trials, mb = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(float, sys.argv[4:7])
log = (folder / "log").open("a")
(folder / f"ready-{name}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
for _ in range(int(trials)):
    with Slots(count, folder / "slots").place() as place:
        place.begin(mb or None)
        log.write(f"begin {name} {time.time()}\\n"); log.flush()
        time.sleep(seconds)
        log.write(f"end {name} {time.time()}\\n"); log.flush()
"""


def start(folder: Path, count: int, name: str, seconds: float, trials: int, go: bool = True) -> subprocess.Popen[bytes]:
    words = [str(folder), str(count), name, str(seconds), str(trials), "0"]
    if go:
        (folder / "go").touch()
    return subprocess.Popen([sys.executable, "-c", TRAIN, *words], stderr=subprocess.DEVNULL)


def log(folder: Path) -> list[tuple[str, str, float]]:
    path = folder / "log"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return sorted(((event, name, float(when)) for event, name, when in rows), key=lambda row: row[2])


def at_once(rows: list[tuple[str, str, float]]) -> int:
    most = now = 0
    for event, _, _ in rows:
        now += 1 if event == "begin" else -1
        most = max(most, now)
    return most


def wait_for(folder: Path, count: int) -> None:
    end = time.monotonic() + 40
    while len(log(folder)) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_sweeps_take_turns(tmp_path: Path) -> None:
    sweeps = [start(tmp_path, 1, name, 0.3, 4, go=False) for name in "ab"]
    while not all((tmp_path / f"ready-{name}").exists() for name in "ab"):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [sweep.wait(60) for sweep in sweeps] == [0, 0]
    rows = log(tmp_path)
    assert len(rows) == 16 and at_once(rows) == 1
    names = "".join(name for event, name, _ in rows if event == "begin")
    assert names in ("abababab", "babababa"), "whoever has waited longest comes next"


def test_the_larger_sweep_says_how_many_train_at_once(tmp_path: Path) -> None:
    sweeps = [start(tmp_path, count, str(n), 0.5, 1, go=False) for n, count in enumerate((2, 2, 1, 1))]
    while len(list(tmp_path.glob("ready-*"))) < 4:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [sweep.wait(60) for sweep in sweeps] == [0] * 4
    assert at_once(log(tmp_path)) == 2


def test_a_killed_holder_frees_its_place(tmp_path: Path) -> None:
    holder = start(tmp_path, 1, "a", 60, 1)
    wait_for(tmp_path, 1)
    waiting = start(tmp_path, 1, "b", 60, 1)  # dies in the queue
    time.sleep(0.5)
    after = start(tmp_path, 1, "c", 0.0, 1)
    time.sleep(0.5)
    waiting.kill()
    waiting.wait()
    assert [name for _, name, _ in log(tmp_path)] == ["a"]
    holder.kill()
    holder.wait()
    assert after.wait(30) == 0 and [name for _, name, _ in log(tmp_path)] == ["a", "c", "c"]


def test_waiting_ends_at_the_deadline(tmp_path: Path) -> None:
    mine, other = Slots(1, tmp_path), Slots(1, tmp_path)
    with mine.place() as place:
        assert place is not None
        began = time.monotonic()
        with other.place(time.monotonic() + 0.3) as none:
            assert none is None
        assert 0.2 < time.monotonic() - began < 5
    with other.place(time.monotonic() - 1) as free:
        assert free is not None, "what is free is taken without waiting"


def test_memory_decides_who_trains_beside_whom(tmp_path: Path) -> None:
    huge = 1e9  # MiB: more than any machine has
    small, alone, big = Slots(3, tmp_path), Slots(3, tmp_path), Slots(3, tmp_path)
    with small.place() as first, big.place() as second, alone.place() as third:
        assert first is not None and second is not None and third is not None
        assert first.begin(huge), "alone on the machine nothing has to fit: the trial itself says when memory ends"
        assert not second.begin(10.0, time.monotonic() + 0.3), "what has begun may still grow to what was predicted"
        assert third.begin(None), "nothing is known of it"
    with small.place() as first, big.place() as second:
        assert first is not None and second is not None
        assert first.begin(1.0)
        assert second.begin(1.0, time.monotonic() + 1), f"{free_memory_mb():.0f} MB free take two small ones"
        assert not second.begin(huge, time.monotonic() + 0.3)


def test_memory_of_a_process() -> None:
    assert 20 < resident_mb(os.getpid()) < 20_000
    assert resident_mb(2**22 + 1) == 0


def test_a_person_is_told_of_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slots, "QUIET_SECONDS", 0.1)
    with Slots(1, tmp_path).place(), Slots(1, tmp_path).place(time.monotonic() + 0.5):
        pass
    assert capsys.readouterr().err == "sweep: waiting for another sweep on this machine\n"
