"""Operators that run metapeft's work as fresh processes: a pipeline stage, or a command.

MLX must never run in a forked process (it hangs), and Airflow's workers fork; so the work happens in a new interpreter,
in a process group of its own that dies with the task. What it prints goes to the task log as it comes.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from metapeft.airflow.links import MLflowRunLink

BAD_INPUT = 2  # exit code of work whose input is wrong: trying again cannot help
GRACE_SECONDS = 10.0
QUIET_SECONDS = 60.0  # how long the log stays silent before it says that the work goes on
MEMORY = "METAPEFT_MEMORY_MB"  # what `metapeft.runtime` keeps within; the environment of a worker may set it for all
DEVICE = "METAPEFT_DEVICE"
MARGIN = 0.9  # the part of its limit that the work itself plans with: a trial then ends as out_of_memory, not killed


class ProcessOperator(BaseOperator):
    """Run a Python module in a fresh process and return the JSON that it prints last on stdout.

    Args:
        module: what `python -m` runs.
        arguments: its command line (templated).
        project: the folder it runs in; its params.yaml gives the defaults.
        memory_mb: resident memory of the process and its children at most, MiB. None: the worker's METAPEFT_MEMORY_MB.
        device: where MLX computes. None: the worker's METAPEFT_DEVICE, else MLX's own choice.

    `execute({})` works without Airflow around it. Raises AirflowFailException (no retry) on bad input, AirflowException
    (retry) on any other failure.
    """

    template_fields: Sequence[str] = ("arguments",)
    operator_extra_links = (MLflowRunLink(),)
    ui_color = "#d8e8d0"

    def __init__(
        self,
        *,
        module: str,
        arguments: Sequence[str] = (),
        project: str = ".",
        memory_mb: float | None = None,
        device: Literal["cpu", "gpu"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.module = module
        self.arguments = list(arguments)
        self.project = project
        self.memory_mb = memory_mb
        self.device = device
        self.run_url = ""  # of the MLflow run, once the work has said it
        self._process: subprocess.Popen[str] | None = None
        self._spoke, self._last = 0.0, ""  # when it last said something, and what
        self._used_mb = 0.0  # once it was too much

    def execute(self, context: Mapping[str, Any]) -> Any:
        command = [sys.executable, "-u", "-m", self.module, *self.command(context.get("params") or {})]
        self.log.info("%s", " ".join(command[2:]))
        limit = self.memory_mb or workers_memory()
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
            self._used_mb, self._spoke, self._last = 0.0, time.monotonic(), ""
            self._process = process = subprocess.Popen(
                command,
                cwd=self.project,
                env=self._environment(limit),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            threading.Thread(target=self._watch, args=(process, limit), daemon=True).start()
            listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
            listener.start()
            try:
                ended(process, None)  # not the end of its output, which whatever it left behind may hold open
            finally:
                self.on_kill()  # a timeout or a cancelled task arrives here as an exception
            listener.join(GRACE_SECONDS)
            return self._outcome(process.returncode, self._last, out)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """What the work says goes to the task's log, as it comes."""
        assert process.stderr is not None
        for line in process.stderr:
            if line := line.rstrip():
                self.log.info("%s", line)
                self._spoke = time.monotonic()
                self._last = line

    def command(self, params: Mapping[str, Any]) -> list[str]:
        """The module's command line for the given DAG parameters."""
        return list(self.arguments)

    def on_kill(self) -> None:
        """End the work and whatever it started: first kindly, then for good."""
        process, self._process = self._process, None
        if process is not None:
            end(process)

    def _environment(self, limit: float | None) -> dict[str, str]:
        given = {"METAPEFT_PARENT": str(os.getpid())}
        if limit:
            given[MEMORY] = f"{MARGIN * limit:.0f}"
        if self.device:
            given[DEVICE] = self.device
        return {**os.environ, **given}

    def _watch(self, process: subprocess.Popen[str], limit: float | None) -> None:
        """End what outgrows its memory, and say now and then that silent work goes on."""
        started = time.monotonic()
        while process.poll() is None:
            now, used = time.monotonic(), memory_mb(process.pid)
            if limit and used > limit:
                self._used_mb = used
                end(process)
                return
            if now - self._spoke > QUIET_SECONDS:
                self._spoke = now
                self.log.info("at work for %.0f s, using %.0f MB", now - started, used)
            time.sleep(0.5)

    def _outcome(self, code: int, last: str, out: IO[str]) -> Any:
        name = self.module.rpartition(".")[2]
        reason = last.removeprefix("error: ")
        if self._used_mb:
            raise AirflowException(f"{name} was ended: it used {self._used_mb:.0f} MB, more than its memory limit")
        if code == BAD_INPUT:
            raise AirflowFailException(f"{name}: {reason}")
        if code < 0:
            raise AirflowException(f"{name} was ended by {signal.Signals(-code).name}; its last line: {reason}")
        if code != 0:
            raise AirflowException(f"{name} ended with exit code {code}: {reason}")
        out.seek(0)
        found = parsed(out.read())
        if isinstance(found, dict):
            self.run_url = str(found.get("run_url") or "")
        return found


class StageOperator(ProcessOperator):
    """Run `python -m metapeft.stages.STAGE` and return its JSON summary.

    Args:
        stage: name of the stage module.
        work: folder of this run's outputs (templated); relative to `METAPEFT_HOME/airflow`.
        settings: dotted setting -> value, on top of params.yaml (templated).
        form: DAG parameter -> dotted setting: what the trigger form sets. Empty fields (None) take the value away.
    """

    template_fields: Sequence[str] = ("arguments", "work", "settings")

    def __init__(
        self,
        *,
        stage: str,
        work: str,
        settings: Mapping[str, Any] | None = None,
        form: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"module": f"metapeft.stages.{stage}"} | kwargs)
        self.stage = stage
        self.work = work
        self.settings = dict(settings or {})
        self.form = dict(form or {})

    def command(self, params: Mapping[str, Any]) -> list[str]:
        settings = self.settings | {setting: params[name] for name, setting in self.form.items() if name in params}
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        work = str(work_folder(self.work, self.project))
        return ["--work", work, *(part for pair in given for part in ("--set", pair)), *self.arguments]


class CommandOperator(ProcessOperator):
    """Run `metapeft ARGUMENTS --json` and return what it prints.

    Args:
        form: DAG parameter -> option, such as {"max_seconds": "--max-seconds"}. Empty fields (None) are left out, a
            list gives its option once for each entry.
    """

    def __init__(self, *, form: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(**{"module": "metapeft.cli"} | kwargs)
        self.form = dict(form or {})

    def command(self, params: Mapping[str, Any]) -> list[str]:
        given: list[str] = []
        for name, option in self.form.items():
            value = params.get(name)
            for one in value if isinstance(value, list) else [value]:
                given += [] if one is None else [option, str(one)]
        return [*self.arguments, *given, "--json"]


def workers_memory() -> float | None:
    """METAPEFT_MEMORY_MB of the worker, MiB; None where it is not set."""
    from metapeft.errors import UserError
    from metapeft.settings import allowed_memory_mb

    try:
        limit = allowed_memory_mb()
    except UserError as error:
        raise AirflowFailException(str(error)) from error
    return None if math.isinf(limit) else limit


def parsed(text: str) -> Any:
    """The JSON that a process printed: all of its output, or the last line. {}: nothing."""
    text = text.strip()
    if not text:
        return {}
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(text.splitlines()[-1])


def memory_mb(pid: int) -> float:
    """Resident memory of a process and everything it started, MiB (0 when it is gone)."""
    import psutil

    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0.0
    used = 0
    for member in family:
        try:
            used += member.memory_info().rss
        except psutil.Error:
            continue
    return used / 2**20


def end(process: subprocess.Popen[str]) -> None:
    """End a process group: SIGTERM, and after some seconds SIGKILL for what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
            break
        ended(process, GRACE_SECONDS)


def ended(process: subprocess.Popen[str], seconds: float | None) -> bool:
    """Wait by polling: Airflow calls `on_kill` from a signal handler, where `Popen.wait`'s lock may be ours."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while process.poll() is None:
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def work_folder(name: str, project: str) -> Path:
    """`METAPEFT_HOME/airflow/NAME`, with every character of a run id that a shell or DVC could mind replaced by "_"."""
    home = Path(project, Path(os.environ.get("METAPEFT_HOME") or ".metapeft").expanduser()).absolute()
    return home / "airflow" / "/".join(re.sub(r"^\.+|[^\w.-]", "_", part) for part in name.split("/"))
