"""Recommendations over HTTP: the answer of `metapeft recommend`, for a task of the catalog or for uploaded rows.

A task that was never measured is measured by that very command in a process of its own, at low priority, one at a time:
the server goes on answering. What a request asked and what came out lie in METAPEFT_HOME/serving/select under the
request's own hash: equal requests share one answer, and after a crash an unfinished one starts again when it is asked
for. A measured task is answered at once; when the experience has grown, from the measurements there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metapeft import api
from metapeft.data import catalog, rows
from metapeft.errors import MetapeftError, UserError
from metapeft.profiling.cache import read as read_record
from metapeft.profiling.cache import write as write_record
from metapeft.serving.engine import Busy
from metapeft.settings import home

QUEUE = 16  # measurements that may wait
SECONDS = 3600.0  # what one may take
KEPT = 1000  # answers remembered in memory

COMMAND = "import os, sys; os.nice(10); from metapeft.cli import main; raise SystemExit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Job:
    """A request to select. state: "queued", "running", "done" or "failed"."""

    id: str
    state: str
    request: dict[str, Any]
    created: float
    recommendation: dict[str, Any] | None = None
    error: str = ""
    experience: str = ""  # what the recommendation was made from
    input_error: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the caller."""
        record: dict[str, Any] = {"id": self.id, "object": "recommendation", "status": self.state}
        if self.recommendation is not None:
            record["recommendation"] = self.recommendation
        if self.error:
            record["error"] = self.error
        return record


class Selector:
    """`ask` and `get` may be called from any thread; they never wait for a measurement."""

    def __init__(self, backbone: str, params: Path | None = None):
        self.backbone, self.params = backbone, params
        self._known: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._one = threading.Lock()  # of the quick answers: they are short, and compete with the engine for the cores
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE)
        self._process: subprocess.Popen[str] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="metapeft-select", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends a measurement that is running; it starts again when it is asked for."""
        self._closing = True
        if self._process is not None:
            self._process.terminate()
        with contextlib.suppress(queue.Full):  # a full queue wakes the thread as well
            self._queue.put_nowait(None)
        self._thread.join(10)

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def ask(self, request: dict[str, Any]) -> Job:
        """The answer if it is known or quickly made, else a job that has been queued.

        request: `task` or `rows` (with an optional `name`), `prefer`, `max_seconds`, `max_memory_mb`. Raises UserError
        for what no recommendation can be made of, Busy when too many measurements wait.
        """
        request = {k: v for k, v in request.items() if v is not None}
        id = hashlib.sha256(json.dumps([self.backbone, request], sort_keys=True).encode()).hexdigest()[:24]
        experience = fingerprint()
        job = self._read(id)
        if job is not None and job.state == "done" and job.experience == experience:
            return job
        if job is not None and job.state in ("queued", "running"):
            return self._again(job)
        if job is not None and job.input_error:
            return job
        if job is None:
            given = request.pop("rows", None)
            if given is not None:
                rows.parse(enumerate(given, start=1), "rows", "row")  # mistakes are told before anything is queued
                request["task"] = str(_store(given, str(request.pop("name", "upload"))))
                request["uploaded"] = True
            else:
                catalog.get(request["task"])
        else:
            request = job.request
        if self._measured(request):
            return self._remember(Job(id, "done", request, time.time(), self._quick(request), "", experience))
        return self._enqueue(Job(id, "queued", request, time.time()))

    def get(self, id: str) -> Job | None:
        """A job by its id; one that a crash interrupted is queued again."""
        job = self._read(id) if re.fullmatch(r"[0-9a-f]{24}", id) else None
        return self._again(job) if job is not None and job.state in ("queued", "running") else job

    def recent(self, count: int = 20) -> list[Job]:
        """The latest requests, newest first."""
        files = sorted(folder().glob("*.json"), key=lambda file: -file.stat().st_mtime)[:count]
        found = [self._read(file.stem) for file in files]
        return [job for job in found if job is not None]

    def _measured(self, request: dict[str, Any]) -> bool:
        settings = api.settings_for(request["task"], params=self.params, backbone=self.backbone)
        return (api.work_folder(settings) / "profile" / "profile.json").exists()

    def _quick(self, request: dict[str, Any]) -> dict[str, Any]:
        options = {key: request.get(key) for key in ("prefer", "max_seconds", "max_memory_mb")}
        with self._one:
            return api.recommend(request["task"], backbone=self.backbone, params=self.params, **options).to_json()

    def _again(self, job: Job) -> Job:
        """A job that waits or runs; put back into the queue when no process of ours knows it."""
        with self._lock:
            known = job.id in self._known
        return job if known else self._enqueue(Job(job.id, "queued", job.request, job.created))

    def _enqueue(self, job: Job) -> Job:
        with self._lock:
            if job.id in self._known and self._known[job.id].state in ("queued", "running"):
                return self._known[job.id]
            if self._queue.full():  # only here is something added, but for what ends the thread
                raise Busy(60.0)
            _write(job)
            self._known[job.id] = job
            self._queue.put_nowait(job.id)
            return job

    def _work(self) -> None:
        while (id := self._queue.get()) is not None and not self._closing:
            job = self._known.get(id)
            if job is None:
                continue
            try:
                self._finish(job)
            except Exception as problem:  # one failed measurement does not end the others
                if self._closing:
                    return
                failed = Job(id, "failed", job.request, job.created, error=f"{type(problem).__name__}: {problem}")
                self._keep(failed)  # who waits is told, also where nothing can be written
                with contextlib.suppress(Exception):
                    _write(failed)

    def _finish(self, job: Job) -> None:
        self._remember(Job(job.id, "running", job.request, job.created))
        experience = fingerprint()
        found, error, wrong = self._measure(job.request)
        if self._closing:
            return
        state = "failed" if found is None else "done"
        self._remember(Job(job.id, state, job.request, job.created, found, error, experience, wrong))

    def _measure(self, request: dict[str, Any]) -> tuple[dict[str, Any] | None, str, bool]:
        """What `metapeft recommend` says, or (None, why not, whether the input was wrong)."""
        arguments = ["recommend", request["task"], "--json", "--backbone", self.backbone]
        for key in ("prefer", "max_seconds", "max_memory_mb"):
            if key in request:
                arguments += [f"--{key.replace('_', '-')}", str(request[key])]
        if self.params is not None:
            arguments += ["--params", str(self.params)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, said = self._process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return None, f"measuring the task took longer than {SECONDS:.0f} s", False
        finally:
            code, self._process = self._process.returncode, None
        if code == 0:
            return json.loads(out), "", False
        reason = next((line for line in reversed(said.splitlines()) if line.startswith("error: ")), "error: failed")
        return None, reason.removeprefix("error: "), code == UserError.exit_code

    def _remember(self, job: Job) -> Job:
        _write(job)
        self._keep(job)
        return job

    def _keep(self, job: Job) -> None:
        with self._lock:
            self._known[job.id] = job
            for old in list(self._known)[: max(0, len(self._known) - KEPT)]:
                if self._known[old].state in ("done", "failed"):
                    del self._known[old]

    def _read(self, id: str) -> Job | None:
        with self._lock:
            if id in self._known:
                return self._known[id]
        record = read_record(folder() / f"{id}.json")
        try:
            job = None if record is None else Job(**record)
            if job is not None and not (isinstance(job.request, dict) and job.id == id):
                return None
        except TypeError:  # of another version
            return None
        if job is not None and job.state in ("done", "failed"):
            with self._lock:
                self._known[id] = job
        return job


def _write(job: Job) -> None:
    try:
        write_record(folder() / f"{job.id}.json", {**job.__dict__})
    except ValueError as error:  # numbers that JSON does not have
        raise MetapeftError(f"the recommendation is not finite: {error}") from error


def folder() -> Path:
    return home() / "serving" / "select"


def fingerprint() -> str:
    """Changes when the experience in METAPEFT_HOME does."""
    files = sorted(path for path in (home() / "experience").rglob("*") if path.is_file())
    facts = [(path.name, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _store(given: list[dict[str, Any]], name: str) -> Path:
    """Uploaded rows as a file, under their hash; the file's name is the task's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", name):
        raise UserError(f"name {name[:60]!r}: use up to 60 letters, digits, dashes and underscores")
    text = "".join(json.dumps(row) + "\n" for row in given)
    path = home() / "serving" / "uploads" / hashlib.sha256(text.encode()).hexdigest()[:24] / f"{name}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path
