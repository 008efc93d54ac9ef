"""Recommendations over HTTP: the answer of `metapeft recommend`, for a task of the catalog or for uploaded rows.

A task that was never measured is measured by that very command in a process of its own, at low priority, one at a time:
the server goes on answering. What a request asked and what came out lie in METAPEFT_HOME/serving/select under the
request's own hash: equal requests share one answer, and after a crash an unfinished one starts again when it is asked
for. A measured task is answered at once, and anew when anything that the answer was made from has changed. A failure is
tried again when it is asked for after a minute: its reason may have been the network or the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from metapeft import api, stages
from metapeft.data import catalog, rows
from metapeft.errors import MetapeftError, UserError
from metapeft.meta import versions
from metapeft.meta.experience import Experience
from metapeft.profiling.cache import read as read_record
from metapeft.profiling.cache import write as write_record
from metapeft.serving.engine import Busy
from metapeft.settings import Settings, home
from metapeft.stages.stage import PARENT, content

PACKAGE = Path(__file__).parents[1]
QUEUE = 16  # measurements that may wait
SECONDS = 3600.0  # what one may take
AGAIN = 60.0  # after so many a failed one may be tried again
KEPT = 1000  # answers remembered, in memory and on disk
UPLOADS = 100  # uploads kept that nobody waits for
WAITING = ("queued", "running")

COMMAND = "import os, sys; os.nice(10); from metapeft.cli import main; raise SystemExit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Job:
    """A request to select. state: "queued", "running", "done" or "failed". ended: when it failed."""

    id: str
    state: str
    request: dict[str, Any]
    created: float
    recommendation: dict[str, Any] | None = None
    error: str = ""
    experience: str = ""  # what the recommendation was made from
    input_error: bool = False
    ended: float = 0.0

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
        self._package = content(PACKAGE)  # as it is loaded here, with the experience and the model that ship
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
        job = self._read(id)
        if job is not None and job.state in WAITING:
            return self._again(job)
        if job is not None and job.state == "failed" and abs(time.time() - job.ended) < AGAIN:
            return job
        basis = self._basis()
        if job is not None and job.recommendation and job.experience == _made_from(basis, job.recommendation):
            return job
        given, text = request.pop("rows", None), None
        if given is not None:
            rows.parse(enumerate(given, start=1), "rows", "row")  # mistakes are told before anything is queued
            text = "".join(json.dumps(row) + "\n" for row in given)
            request["task"] = str(_place(text, str(request.pop("name", "upload"))))
            request["uploaded"] = True
        else:
            catalog.get(request["task"])
        if (found := self._quick(request)) is not None:
            return self._remember(Job(id, "done", request, time.time(), found, "", _made_from(basis, found)))
        return self._enqueue(Job(id, "queued", request, time.time()), text)

    def get(self, id: str) -> Job | None:
        """A job by its id; one that a crash interrupted is queued again."""
        job = self._read(id) if re.fullmatch(r"[0-9a-f]{24}", id) else None
        return self._again(job) if job is not None and job.state in WAITING else job

    def recent(self, count: int = 20) -> list[Job]:
        """The latest requests, newest first."""
        found = [self._read(file.stem) for file in _newest(folder().glob("*.json"))[:count]]
        return [job for job in found if job is not None]

    def _basis(self) -> str:
        """Changes when what every recommendation is made from does: the package, the settings, the experience, the
        profiles of the tasks in it, the meta-model in force. Asked for with every request: some milliseconds."""
        params = self.params or Path("params.yaml")
        state, champion = Experience().state(), versions.champion()
        tried = _tried(state)
        profiles = [p for p in (home() / "profiles").glob("*.json") if p.name.partition("-")[0] in tried]
        given = params.read_bytes() if params.is_file() else b""
        return _digest([self._package, given, state, champion.number, champion.model, _stamps(profiles)])

    def _settings(self, task: str) -> Settings:
        return api.settings_for(task, params=self.params, backbone=self.backbone)

    def _quick(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, where nothing needs to be measured for it."""
        options = {key: request.get(key) for key in ("prefer", "max_seconds", "max_memory_mb")}
        with self._one:
            settings = self._settings(request["task"])
            work = api.work_folder(settings)
            if not all(stages.get(name).current(settings, work) for name in api.PROFILED):
                return None
            return api.recommend(request["task"], backbone=self.backbone, params=self.params, **options).to_json()

    def _again(self, job: Job) -> Job:
        """A job that waits or runs; put back into the queue when no process of ours knows it."""
        with self._lock:
            known = job.id in self._known
        return job if known else self._enqueue(Job(job.id, "queued", job.request, job.created))

    def _enqueue(self, job: Job, text: str | None = None) -> Job:
        """text: rows that were uploaded; stored only when there is room in the queue."""
        with self._lock:
            if job.id in self._known and self._known[job.id].state in WAITING:
                return self._known[job.id]
            if self._queue.full():  # only here is something added, but for what ends the thread
                raise Busy(60.0)
            if text is not None:
                _store(Path(job.request["task"]), text)
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
                said = f"{type(problem).__name__}: {problem}"
                failed = Job(id, "failed", job.request, job.created, error=said, ended=time.time())
                self._keep(failed)  # who waits is told, also where nothing can be written
                with contextlib.suppress(Exception):
                    _write(failed)
            with contextlib.suppress(OSError, MetapeftError):  # tried again after the next one
                self._tidy()

    def _finish(self, job: Job) -> None:
        self._remember(Job(job.id, "running", job.request, job.created))
        basis = self._basis()
        found, error, wrong = self._measure(job.request)
        if self._closing:
            return
        if found is None:
            failed = Job(job.id, "failed", job.request, job.created, error=error, input_error=wrong, ended=time.time())
            self._remember(failed)
        else:
            self._remember(Job(job.id, "done", job.request, job.created, found, "", _made_from(basis, found)))

    def _tidy(self) -> None:
        """Bounds what is kept on disk: of what nobody waits for, the oldest go."""
        jobs = {file: _load(file) for file in _newest(folder().glob("*.json"))}
        waiting = {file: job for file, job in jobs.items() if job is not None and job.state in WAITING}
        for file in [file for file in jobs if file not in waiting][KEPT:]:
            file.unlink(missing_ok=True)
        with self._one, self._lock:  # no quick answer is being made of an upload, none comes into the queue
            known = [*waiting.values(), *(job for job in self._known.values() if job.state in WAITING)]
            needed = {Path(str(job.request.get("task"))).parent.name for job in known}
            for upload in [place for place in _newest(_uploads().glob("*")) if place.name not in needed][UPLOADS:]:
                for file in upload.glob("*.jsonl"):
                    work = api.work_folder(self._settings(str(file)))  # the stages have a copy of the rows
                    if {path.name for path in work.glob("[!.]*")} <= {*api.PROFILED}:  # nobody's sweep
                        shutil.rmtree(work, ignore_errors=True)
                shutil.rmtree(upload, ignore_errors=True)

    def _measure(self, request: dict[str, Any]) -> tuple[dict[str, Any] | None, str, bool]:
        """What `metapeft recommend` says, or (None, why not, whether the input was wrong)."""
        if request.get("uploaded"):
            work = api.work_folder(self._settings(request["task"]))  # the stages copy the rows to it
            work.mkdir(parents=True, exist_ok=True)
            work.chmod(0o700)
        arguments = ["recommend", request["task"], "--json", "--backbone", self.backbone]
        for key in ("prefer", "max_seconds", "max_memory_mb"):
            if key in request:
                arguments += [f"--{key.replace('_', '-')}", str(request[key])]
        if self.params is not None:
            arguments += ["--params", str(self.params)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, PARENT: str(os.getpid())},
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
        return None, _told(reason.removeprefix("error: "), request), code == UserError.exit_code

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
        job = _load(folder() / f"{id}.json")
        if job is not None and job.state in ("done", "failed"):
            with self._lock:
                self._known[id] = job
        return job


def _told(reason: str, request: dict[str, Any]) -> str:
    """For the caller, who gave rows and a name, not a file."""
    return reason.replace(request["task"], Path(request["task"]).stem) if request.get("uploaded") else reason


def _load(file: Path) -> Job | None:
    """What a file holds, None where it is damaged."""
    record = read_record(file)
    try:
        job = None if record is None else Job(**record)
    except TypeError:  # of another version
        return None
    return job if job is not None and isinstance(job.request, dict) and job.id == file.stem else None


def _write(job: Job) -> None:
    try:
        write_record(folder() / f"{job.id}.json", {**job.__dict__})
    except ValueError as error:  # numbers that JSON does not have
        raise MetapeftError(f"the recommendation is not finite: {error}") from error


def folder() -> Path:
    return home() / "serving" / "select"


def _made_from(basis: str, found: dict[str, Any]) -> str:
    """What this recommendation was made from: beside what all are, what was measured of its task and of the machine.
    Both are there only when it has been made."""
    own = (home() / "profiles").glob(f"{found.get('task_version')}-*.json")
    return f"{basis}-{_digest([_stamps(own), _stamps((home() / 'speed').glob('*.json'))])}"


@lru_cache(maxsize=1)
def _tried(state: object) -> frozenset[str]:
    """Versions of the tasks in the experience, while that is in this state: other profiles are evidence of nothing."""
    return frozenset(trial.task_version for trial in Experience().trials())


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What changes when a file does."""
    found = []
    for file in sorted(files):
        with contextlib.suppress(FileNotFoundError):
            looks = file.stat()
            found.append((file.name, looks.st_size, looks.st_mtime_ns))
    return found


def _newest(paths: Iterable[Path]) -> list[Path]:
    """The latest written first; without what is removed meanwhile."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _uploads() -> Path:
    return home() / "serving" / "uploads"


def _place(text: str, name: str) -> Path:
    """Of uploaded rows: under their hash; the file's name is the task's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", name):
        raise UserError(f"name {name[:60]!r}: use up to 60 letters, digits, dashes and underscores")
    return _uploads() / hashlib.sha256(text.encode()).hexdigest()[:24] / f"{name}.jsonl"


def _store(path: Path, text: str) -> None:
    """An upload, which nobody else may read. One that is stored again is the newest again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        for place in (_uploads(), path.parent):
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(0o700)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); set METAPEFT_HOME to a folder you may write in"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
