"""A process that has imported everything heavy and forks a child per case: a fault costs what it breaks, no start.

MLX survives a fork as long as nothing was computed before it, so this process computes nothing. It reads one JSON
request per line: a function ("module:name") with keyword arguments, variables of the environment, and the fault to arm.
Each child answers with how it ended. `Zygote` is the other side.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "metapeft.runtime", "metapeft.cli", "metapeft.api", "metapeft.stages.sweep_worker", "metapeft.tracking.models",
    "metapeft.tracking.tracker", "metapeft.serving.registry", "metapeft.report", "metapeft.report.pictures",
    "metapeft.profiling.probe", "metapeft.training.trainer", "metapeft.search.grow", "metapeft.report.write",
    "mlx_lm.utils", "mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store",
    "optuna", "optuna.storages", "great_expectations", "pandas", "pyarrow.parquet", "matplotlib.pyplot", "filelock",
    "sklearn.linear_model", "transformers", "safetensors", "pydantic", "yaml", "rich.table", "scipy.stats",
)  # fmt: skip


@dataclass
class Ended:
    """How a child ended: its exit code (negative: the signal), what it wrote, what the function returned."""

    code: int
    err: str
    out: str
    result: Any = None
    points: list[tuple[str, str]] = field(default_factory=list)

    @property
    def error(self) -> str:
        """The one line of a mistake. AssertionError where it is not one line, or a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert "Traceback" not in self.err, self.err
        assert len(lines) == 1, self.err
        return lines[0]


class Zygote:
    """Starts the process, and asks it. variables: of the environment of all children."""

    def __init__(self, **variables: str):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **variables}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.call("builtins:len", obj_or_args=["x"])

    def call(
        self,
        function: str,
        *,
        obj_or_args: list[Any] | None = None,
        environment: dict[str, str] | None = None,
        fault: dict[str, Any] | None = None,
        seconds: float = 240.0,
        **arguments: Any,
    ) -> Ended:
        """Runs `function` in a child. fault: {"roots", "kind", "at"} of `points.arm`. Raises TimeoutError."""
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "function": function,
                "args": obj_or_args or [],
                "arguments": arguments,
                "environment": environment or {},
                "fault": fault,
                "folder": folder,
                "seconds": seconds,
            }
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if not answer:
                raise AssertionError("the zygote has died")
            code = json.loads(answer)["code"]
            if code is None:
                raise TimeoutError(f"{function} {arguments} took over {seconds} s")
            from tests.faults import points

            place = Path(folder)
            result = place / "result"
            return Ended(
                code,
                (place / "err").read_text(errors="replace"),
                (place / "out").read_text(errors="replace"),
                json.loads(result.read_text()) if result.exists() else None,
                points.read(place / "points"),
            )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def serve() -> None:
    """The zygote's own loop."""
    for name in HEAVY:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            _child(request)
        answers.write(json.dumps({"code": _wait(child, time.monotonic() + request["seconds"])}) + "\n")
        answers.flush()


if "FAKETIME_TIMESTAMP_FILE" in os.environ:
    import select

    # Python's own sleep waits until an absolute moment, which libfaketime counts from its own clock and then refuses.
    time.sleep = lambda seconds: select.select([], [], [], seconds) and None  # type: ignore[assignment]


def _wait(child: int, deadline: float) -> int | None:
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def _child(request: dict[str, Any]) -> None:
    folder = Path(request["folder"])
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
    sys.stdin.close()
    os.environ.update(request["environment"])
    code = 70
    try:
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        if request["fault"]:
            from tests.faults import points

            points.arm(**request["fault"], log=str(folder / "points"))
        result = function(*request["args"], **request["arguments"])
        code = result if isinstance(result, int) and not isinstance(result, bool) else 0
        (folder / "result").write_text(json.dumps(result))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
