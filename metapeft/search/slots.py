"""Who may train on this machine now: two sweeps at once take turns instead of thrashing it.

A sweep with N workers trains in the machine's places 0 … N-1, so as many trainings run at the same time as the largest
sweep asked for, however many sweeps there are; whoever has waited longest comes next. Into a second place only goes
what fits into memory beside the trainings that have begun, by their predictions. A place is a locked file, which the
system frees however its holder ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metapeft.progress import say
from metapeft.runtime import MB, free_memory_mb, total_memory_mb

FOLDER = "METAPEFT_SLOTS"  # in the environment: for containers that share a machine, but no folder for temporary files
POLL_SECONDS = 0.1
QUIET_SECONDS = 3.0  # of waiting, before a person is told
OVERHEAD_MB = 400.0  # a process that trains, beside what MLX holds


class Slots:
    """The machine's places as one worker of a sweep with `count` workers sees them. folder: where their files lie."""

    def __init__(self, count: int, folder: Path | None = None):
        self.count = count
        usual = Path(tempfile.gettempdir()) / f"metapeft-slots-{os.getuid()}"
        self.folder = folder or Path(os.environ.get(FOLDER) or usual)
        (self.folder / "queue").mkdir(parents=True, exist_ok=True)

    @contextmanager
    def place(self, deadline: float | None = None) -> Iterator[Place | None]:
        """A place, after as much waiting as it takes; None: none was free before `deadline` (as `time.monotonic`)."""
        file = self._wait(deadline)
        if file is None:
            yield None
            return
        try:
            yield Place(self, file)
        finally:
            with self.alone():
                os.ftruncate(file, 0)
                os.close(file)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else on this machine is inside."""
        file = os.open(self.folder / "mutex", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def training(self) -> list[dict[str, float]]:
        """What the holders of places have said of their trainings: {"pid", "mb"}. Call it inside `alone`."""
        found = []
        for path in self.folder.glob("place-*"):
            with suppress(OSError, ValueError):
                if _locked(path):
                    found.append(json.loads(path.read_text(encoding="ascii")))
        return found

    def _wait(self, deadline: float | None) -> int | None:
        with self.alone():
            name = f"{time.time_ns():020d}-{self.count}-{os.getpid()}-{secrets.token_hex(4)}"
            ticket = self.folder / "queue" / name
            mine = os.open(ticket, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(mine, fcntl.LOCK_EX)
        began, told = time.monotonic(), False
        try:
            while True:
                with self.alone():
                    place = self._turn(name)
                    if place is not None:
                        file = os.open(self.folder / f"place-{place}", os.O_RDWR | os.O_CREAT, 0o600)
                        fcntl.flock(file, fcntl.LOCK_EX)
                        os.ftruncate(file, 0)
                        return file
                if deadline is not None and time.monotonic() >= deadline:
                    return None
                if not told and time.monotonic() - began > QUIET_SECONDS:
                    told = True
                    say("sweep: waiting for another sweep on this machine")
                time.sleep(POLL_SECONDS)
        finally:
            ticket.unlink(missing_ok=True)
            os.close(mine)

    def _turn(self, mine: str) -> int | None:
        """The place that is mine now: those who wait are served in their order, each with the first that it may use."""
        taken: set[int] = set()
        for ticket in sorted((self.folder / "queue").iterdir()):
            if ticket.name != mine and not _locked(ticket):
                ticket.unlink(missing_ok=True)  # its holder died
                continue
            count = int(ticket.name.split("-")[1])
            free = [n for n in range(count) if n not in taken and not _locked(self.folder / f"place-{n}")]
            if ticket.name == mine:
                return free[0] if free else None
            taken |= set(free[:1])
        return None


class Place:
    """A place that is held. `begin` waits until the machine's memory takes the training."""

    def __init__(self, slots: Slots, file: int):
        self._slots, self._file = slots, file

    def begin(self, predicted_mb: float | None, deadline: float | None = None) -> bool:
        """Whether it may start: at once where nobody else trains, or nothing is predicted; else as soon as it fits.

        predicted_mb: MLX's peak, the model included. False: it did not fit before `deadline`.
        """
        needed = OVERHEAD_MB + (predicted_mb or 0.0)
        while True:
            with self._slots.alone():
                others = self._slots.training()
                reserve = 0.02 * total_memory_mb()
                to_come = sum(max(0.0, other["mb"] - resident_mb(int(other["pid"]))) for other in others)
                room = free_memory_mb() - reserve - to_come if others and predicted_mb else 0.0
                if not others or not predicted_mb or needed - resident_mb(os.getpid()) <= room:
                    os.pwrite(self._file, json.dumps({"pid": os.getpid(), "mb": needed}).encode("ascii"), 0)
                    return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)


def resident_mb(pid: int) -> float:
    """Memory that a process has now, in MiB; 0 where there is no such process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MB
    except (OSError, ValueError, IndexError):
        pass
    if Path("/proc/self/statm").exists():
        return 0.0
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return float(done.stdout.strip() or 0) / 1024


def _locked(path: Path) -> bool:
    """Whether somebody (this process too, with another descriptor) holds the file's lock."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(file)
