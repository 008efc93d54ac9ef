"""The operator that runs one pipeline stage as a fresh process.

MLX must never run in a forked process (it hangs), and Airflow's workers fork; so the work happens in a new interpreter,
in a process group of its own that dies with the task.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from metapeft.airflow.links import MLflowRunLink

BAD_INPUT = 2  # exit code of a stage whose input is wrong: trying again cannot help
GRACE_SECONDS = 10.0


class StageOperator(BaseOperator):
    """Run `python -m metapeft.stages.STAGE` and return its JSON summary.

    Args:
        stage: name of the stage module.
        work: folder of this run's outputs (templated); relative to `METAPEFT_HOME/airflow`.
        settings: dotted setting -> value, on top of params.yaml (templated).
        form: DAG parameter -> dotted setting: what the trigger form sets. Empty fields (None) leave the default.
        project: folder the stage runs in; its params.yaml gives the defaults.
        arguments: further command-line arguments of the stage (templated).

    Raises AirflowFailException (no retry) on bad input, AirflowException (retry) on any other failure.
    """

    template_fields: Sequence[str] = ("work", "settings", "arguments")
    operator_extra_links = (MLflowRunLink(),)
    ui_color = "#d8e8d0"

    def __init__(
        self,
        *,
        stage: str,
        work: str,
        settings: Mapping[str, Any] | None = None,
        form: Mapping[str, str] | None = None,
        project: str = ".",
        arguments: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.work = work
        self.settings = dict(settings or {})
        self.form = dict(form or {})
        self.project = project
        self.arguments = list(arguments)
        self.run_url = ""  # of the MLflow run, once the stage has said it
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Mapping[str, Any]) -> dict[str, Any]:
        command = self.command(context.get("params") or {})
        self.log.info("%s", " ".join(command[1:]))
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
            self._process = process = subprocess.Popen(
                command,
                cwd=self.project,
                env={**os.environ, "METAPEFT_PARENT": str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            last = ""
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    if line := line.rstrip():
                        self.log.info("%s", line)
                        last = line
                ended(process, None)
            finally:
                self.on_kill()  # a timeout or a cancelled task arrives here as an exception
            return self._outcome(process.returncode, last, out)

    def command(self, params: Mapping[str, Any]) -> list[str]:
        """The stage's command line for the given DAG parameters."""
        settings = self.settings | {setting: params.get(name) for name, setting in self.form.items()}
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
        return [
            *(
                sys.executable,
                "-u",
                "-m",
                f"metapeft.stages.{self.stage}",
                "--work",
                str(work_folder(self.work, self.project)),
            ),
            *(part for pair in given for part in ("--set", pair)),
            *self.arguments,
        ]

    def on_kill(self) -> None:
        """End the stage and whatever it started: first kindly, then for good."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except (ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
                break
            ended(process, GRACE_SECONDS)

    def _outcome(self, code: int, last: str, out: IO[str]) -> dict[str, Any]:
        if code == BAD_INPUT:
            raise AirflowFailException(f"{self.stage}: {last.removeprefix('error: ')}")
        if code != 0:
            raise AirflowException(f"{self.stage} ended with exit code {code}: {last.removeprefix('error: ')}")
        out.seek(0)
        lines = out.read().strip().splitlines()
        summary = dict(json.loads(lines[-1])) if lines else {}
        self.run_url = str(summary.get("run_url") or "")
        return summary


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
    home = Path(project, os.environ.get("METAPEFT_HOME", ".metapeft")).expanduser().absolute()
    return home / "airflow" / "/".join(re.sub(r"^\.+|[^\w.-]", "_", part) for part in name.split("/"))
