from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from metapeft.search.locks import FileLocks

HOLD = """
import sys, time
from pathlib import Path
from metapeft.search.locks import FileLocks
locks = FileLocks(Path(sys.argv[1]))
locks.hold("worker")
print("held", flush=True)
time.sleep(60)
"""

COUNT = """
import sys
from pathlib import Path
from metapeft.search.locks import FileLocks
locks, counter = FileLocks(Path(sys.argv[1])), Path(sys.argv[2])
for _ in range(100):
    with locks.exclusive():
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_a_lock_lives_as_long_as_its_process(tmp_path: Path) -> None:
    mine = FileLocks(tmp_path)
    assert not mine.held("worker")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert mine.held("worker") and mine.held("worker"), "asking does not take it"
    finally:
        process.kill()
        process.wait()
    assert not mine.held("worker")


def test_close_gives_back_and_cleans_up(tmp_path: Path) -> None:
    one, two = FileLocks(tmp_path), FileLocks(tmp_path)
    one.hold("a")
    assert two.held("a")
    one.close()
    assert not two.held("a")
    assert not (tmp_path / "a.lock").exists()


def test_only_one_worker_is_inside(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "locks"), str(counter)]
    workers = [subprocess.Popen(command) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert counter.read_text() == "300"
