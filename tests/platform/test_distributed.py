"""The platform as a team runs it: PostgreSQL, Redis, MLflow, Airflow with two Celery workers; a kill -9 in mid-sweep.

`make test-platform` runs it: it needs the servers (Debian: apt-get install postgresql redis-server) and the packages of
docker/requirements.txt, which that target installs beside the environment.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backbones.tiny import tiny_folder
from tests.stages.made import spam_file

pytestmark = [
    pytest.mark.skipif("METAPEFT_TEST_PLATFORM" not in os.environ, reason="make test-platform runs it"),
    pytest.mark.timeout(3000),
]
ROOT = Path(__file__).resolve().parents[2]
TRIALS = 10
PASSWORD = "postgres-password"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, seconds: float, ready: Callable[[], Any]) -> Any:
    """The first true value of `ready`; errors of a server that is not there yet count as not ready."""
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if value := ready():
                return value
        except (OSError, ValueError, KeyError) as error:
            last = error
        time.sleep(1.0)
    raise AssertionError(f"waited {seconds:.0f} s for {what} ({last})")


class Platform:
    """All services, each a real process with a log in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.home = folder / "home"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.database, self.redis, self.api, self.mlflow = (free_port() for _ in range(4))
        self.environment = {**os.environ, **self._variables(), "METAPEFT_SLOTS": str(folder / "slots")}

    def _variables(self) -> dict[str, str]:
        airflow = self.folder / "airflow"
        airflow.mkdir()
        (airflow / "passwords.json").write_text(json.dumps({"admin": "admin"}))
        place = f"postgres:{PASSWORD}@127.0.0.1:{self.database}"
        options = {
            "API__BASE_URL": f"http://127.0.0.1:{self.api}",
            "API__SECRET_KEY": secrets.token_hex(32),
            "API_AUTH__JWT_SECRET": secrets.token_hex(64),
            "CELERY__BROKER_URL": f"redis://127.0.0.1:{self.redis}/0",
            "CELERY__RESULT_BACKEND": f"db+postgresql+psycopg2://{place}/airflow",
            "CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
            "CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self.api}/execution/",
            "CORE__EXECUTOR": "CeleryExecutor",
            "CORE__LOAD_EXAMPLES": "false",
            "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(airflow / "passwords.json"),
            "CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
            "DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{place}/airflow",
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
        }
        return {f"AIRFLOW__{name}": value for name, value in options.items()} | {
            "AIRFLOW_HOME": str(airflow),
            "METAPEFT_HOME": str(self.home),
            "METAPEFT_MLX_SLOTS": "2",
            "METAPEFT_SWEEP_STORAGE": f"postgresql://{place}/sweeps",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.mlflow}",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *map(os.path.abspath, filter(None, [os.environ.get("PYTHONPATH")]))]
            ),
        }

    def start(self, name: str, *command: str, environment: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=environment or self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    def airflow(self, name: str, *words: str) -> None:
        self.start(name, sys.executable, "-m", "airflow", *words)

    def up(self) -> None:
        self._start_postgresql()
        self.start("redis", str(shutil.which("redis-server")), "--port", str(self.redis), "--save", "")
        self.run(sys.executable, "-m", "airflow", "db", "migrate")
        store = f"postgresql+psycopg2://postgres:{PASSWORD}@127.0.0.1:{self.database}/mlflow"
        self.start(
            *("mlflow", sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.mlflow}"),
            *("--workers=1", f"--artifacts-destination={self.folder / 'artifacts'}"),
            environment=self.environment | {"MLFLOW_BACKEND_STORE_URI": store},
        )
        self.airflow("api-server", "api-server", "--host", "127.0.0.1", "--port", str(self.api), "--workers", "1")
        self.airflow("scheduler", "scheduler")
        self.airflow("dag-processor", "dag-processor")
        until("MLflow", 600, lambda: self.http(f"http://127.0.0.1:{self.mlflow}/health"))
        until("Airflow's API", 600, lambda: self.http(f"http://127.0.0.1:{self.api}/api/v2/monitor/health"))
        for name in ("worker-1", "worker-2"):
            self.airflow(
                name, "celery", "worker", "--concurrency", "1", "--celery-hostname", f"{name}@%h", "-q", "default"
            )

    def _start_postgresql(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
        assert initdb and shutil.which("redis-server"), "apt-get install postgresql redis-server"
        person = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        place = self.folder / "postgresql"
        place.mkdir()
        if person:
            shutil.chown(place, "postgres")
            for folder in [self.folder, *self.folder.parents]:
                if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
                    folder.chmod(folder.stat().st_mode | 0o011)
        data = str(place / "data")
        (self.folder / "word").write_text(PASSWORD)
        (self.folder / "word").chmod(0o644)
        words = ["-D", data, "-A", "scram-sha-256", "-U", "postgres", "--no-sync", "-E", "UTF8"]
        subprocess.run([*person, initdb, *words, f"--pwfile={self.folder / 'word'}"], check=True, capture_output=True)
        options = (
            f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={place} -c fsync=off -c max_connections=200"
        )
        server = str(Path(initdb).with_name("postgres"))
        self.start("postgresql", *person, server, "-D", data, "-p", str(self.database), *options.split())
        import psycopg

        def connect() -> Any:
            try:
                return psycopg.connect(self.dsn("postgres"), autocommit=True)
            except psycopg.OperationalError as error:
                raise OSError(error) from error

        with until("PostgreSQL", 300, connect) as connection:
            for name in ("airflow", "mlflow", "sweeps"):
                connection.execute(f"CREATE DATABASE {name}")

    def dsn(self, name: str) -> str:
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.database}/{name}"

    def http(self, url: str, method: str = "GET", body: Any = None, token: str = "") -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=30) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else text

    def rest(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Airflow's REST API, as a person would use it."""
        base = f"http://127.0.0.1:{self.api}"
        if not hasattr(self, "token"):
            given = {"username": "admin", "password": "admin"}
            self.token = str(self.http(f"{base}/auth/token", "POST", given)["access_token"])
        return self.http(f"{base}/api/v2{path}", method, body, self.token)

    def kill(self, name: str) -> None:
        """SIGKILL of a service and all it forked. (Its stages must notice by themselves.)"""
        import psutil

        process = psutil.Process(self.processes[name].pid)
        family = [process, *process.children(recursive=True)]
        for member in family:
            if "metapeft.stages" not in " ".join(member.cmdline()):
                member.kill()

    def down(self) -> None:
        for name in reversed(list(self.processes)):
            process = self.processes[name]
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT if name == "postgresql" else signal.SIGTERM)
        deadline = time.monotonic() + 15
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    found = Platform(tmp_path)
    try:
        found.up()
        yield found
    except BaseException:
        for log in sorted(tmp_path.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}")
        raise
    finally:
        found.down()


def states(platform: Platform) -> Counter[str]:
    """States of the sweep's Optuna trials that were not given up for another."""
    import psycopg

    query = """select t.state::text, count(*) from trials t where not exists (select 1 from trial_user_attributes a
               where a.trial_id = t.trial_id and a.key = 'void') group by 1"""
    try:
        with psycopg.connect(platform.dsn("sweeps")) as connection:
            return Counter(dict(connection.execute(query).fetchall()))
    except psycopg.errors.UndefinedTable as error:
        raise OSError(error) from error


def test_a_worker_killed_in_mid_sweep_costs_nothing(platform: Platform, tmp_path: Path) -> None:
    path = "/dags/tune_task"
    until("the DAG", 600, lambda: platform.rest(path)["dag_id"] == "tune_task")
    pools = {pool["name"]: pool["slots"] for pool in platform.rest("/pools")["pools"]}
    assert pools["mlx"] == 2 and pools["dvc"] == 1, "made by Airflow's own start"
    platform.rest(path, "PATCH", {"is_paused": False})
    small = {"task": str(spam_file(tmp_path)), "backbone": str(tiny_folder("llama")), "seed": 1}
    form = small | {"trials": TRIALS, "trial_steps": 40, "steps": 5, "workers": 2}
    with pytest.raises(urllib.error.HTTPError, match="400"):
        platform.rest(f"{path}/dagRuns", "POST", {"logical_date": None, "conf": form | {"trials": 0}})
    run = platform.rest(f"{path}/dagRuns", "POST", {"logical_date": None, "conf": form})["dag_run_id"]

    def tasks() -> list[dict[str, Any]]:
        return list(platform.rest(f"{path}/dagRuns/{run}/taskInstances")["task_instances"])

    def both_at_work() -> bool:
        now = states(platform)
        return now["COMPLETE"] >= 1 and now["RUNNING"] >= 2

    until("two workers in the sweep", 900, both_at_work)
    hosts = {t["hostname"] for t in tasks() if t["task_id"] == "sweep_worker" and t["state"] == "running"}
    assert hosts, "mapped tasks are running"
    before = states(platform)
    platform.kill("worker-1")
    assert before["COMPLETE"] < TRIALS, "the kill comes in the middle"

    def ended() -> str | None:
        state = platform.rest(f"{path}/dagRuns/{run}")["state"]
        return state if state in ("success", "failed") else None

    outcome = until("the run to end", 900, ended)
    rows = [(t["task_id"], t["map_index"], t["state"], t["try_number"]) for t in tasks()]
    assert outcome == "success", rows
    assert max(number for name, _, _, number in rows if name == "sweep_worker") == 2, (
        "one worker's task was tried again"
    )

    (work,) = (platform.home / "airflow" / "tune_task").iterdir()
    trials = [json.loads(line) for line in (work / "sweep/trials.jsonl").read_text().splitlines()]
    ids = [trial["id"] for trial in trials]
    assert len(ids) == len(set(ids)) == TRIALS and not any(trial["status"] == "failed" for trial in trials)
    from mlflow import MlflowClient

    client = MlflowClient(platform.environment["MLFLOW_TRACKING_URI"])
    (parent,) = client.search_runs(["1"], "tags.selection != ''")
    nested = client.search_runs(["1"], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert Counter(run.data.tags["trial_id"] for run in nested) == Counter(ids), "every trial is one run"
    (version,) = client.search_model_versions("")
    assert version.tags["dvc_id"] and json.loads((work / "register/model.json").read_text())["alias"] == "champion"
