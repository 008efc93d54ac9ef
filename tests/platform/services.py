"""The platform's services as real processes of this machine, each with a log in one folder."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "postgres-password"
DATABASES = ("airflow", "mlflow", "sweeps")


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
        self.postgresql: Path | None = None
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.database, self.redis, self.api, self.mlflow, self.s3 = (free_port() for _ in range(5))
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

    def store(self) -> dict[str, str]:
        """Variables of whoever reads and writes the S3 store."""
        return {
            "AWS_ACCESS_KEY_ID": "metapeft",
            "AWS_SECRET_ACCESS_KEY": "store-password-0123456789",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3}",
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.s3}",
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
        self.start_store(self.folder / "store")
        setup = [sys.executable, str(ROOT / "docker/setup_store.py"), "mlflow", "dvc"]
        for _ in range(2):  # may be repeated
            subprocess.run(setup, env=self.environment | self.store(), check=True)
        self.run(sys.executable, "-m", "airflow", "db", "migrate")
        self.start_mlflow()
        self.start_api()
        self.airflow("scheduler", "scheduler")
        self.airflow("dag-processor", "dag-processor")
        self.answer()
        for name in ("worker-1", "worker-2"):
            self.airflow(
                name, "celery", "worker", "--concurrency", "1", "--celery-hostname", f"{name}@%h", "-q", "default"
            )

    def start_store(self, folder: Path) -> None:
        """SeaweedFS as docker-compose.yaml runs it, its other ports free ones."""
        folder.mkdir(exist_ok=True)
        ports = [f"-{part}.port={free_port()}" for part in ("master", "volume", "filer")]
        ports += [f"-{part}.port.grpc={free_port()}" for part in ("master", "volume", "filer", "s3")]
        here = {"-dir": str(folder), "-ip": "127.0.0.1", "-ip.bind": "127.0.0.1"}
        compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]["seaweedfs"]
        words = [f"{o}={here[o]}" if (o := word.partition("=")[0]) in here else word for word in compose["command"]]
        self.start(
            "store", str(weed()), *words, f"-s3.port={self.s3}", *ports, environment=self.environment | self.store()
        )
        until("the S3 store", 300, lambda: self.http(f"http://127.0.0.1:{self.s3}/healthz") is not None)

    def start_mlflow(self) -> None:
        store = f"postgresql+psycopg2://postgres:{PASSWORD}@127.0.0.1:{self.database}/mlflow"
        self.start(
            *("mlflow", sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.mlflow}"),
            *("--workers=1", "--artifacts-destination=s3://mlflow"),
            environment=self.environment | self.store() | {"MLFLOW_BACKEND_STORE_URI": store},
        )

    def start_api(self) -> None:
        self.airflow("api-server", "api-server", "--host", "127.0.0.1", "--port", str(self.api), "--workers", "1")

    def answer(self) -> None:
        """Wait until both servers answer."""
        until("MLflow", 600, lambda: self.http(f"http://127.0.0.1:{self.mlflow}/health"))
        until("Airflow's API", 600, lambda: self.http(f"http://127.0.0.1:{self.api}/api/v2/monitor/health"))

    def stop(self, *names: str) -> None:
        """SIGTERM, and after some seconds SIGKILL (PostgreSQL: SIGINT, which does not wait for its clients)."""
        for name in names:
            process = self.processes[name]
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT if name == "postgresql" else signal.SIGTERM)
        deadline = time.monotonic() + 15
        for name in names:
            process = self.processes.pop(name)
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def down(self) -> None:
        self.stop(*reversed(list(self.processes)))
        if self.postgresql:
            shutil.rmtree(self.postgresql, ignore_errors=True)

    def _start_postgresql(self) -> None:
        """In a folder outside of pytest's, which only its owner may enter."""
        initdb = program("initdb")
        person = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        place = self.postgresql = Path(tempfile.mkdtemp(prefix="metapeft-postgresql-", dir="/tmp"))
        (place / "word").write_text(PASSWORD)
        if person:
            shutil.chown(place, "postgres")
            shutil.chown(place / "word", "postgres")
        data = str(place / "data")
        words = ["-D", data, "-A", "scram-sha-256", "-U", "postgres", "--no-sync", "-E", "UTF8"]
        given = [*person, str(initdb), *words, f"--pwfile={place / 'word'}"]
        subprocess.run(given, check=True, capture_output=True, cwd=place)
        options = (
            f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={place} -c fsync=off -c max_connections=200"
        )
        server = str(initdb.with_name("postgres"))
        self.start("postgresql", *person, server, "-D", data, "-p", str(self.database), *options.split())
        self.create(DATABASES)

    def create(self, names: Sequence[str], drop: bool = False) -> None:
        """Empty databases; drop: in place of those that are there."""
        import psycopg

        def connect() -> Any:
            try:
                return psycopg.connect(self.dsn("postgres"), autocommit=True)
            except psycopg.OperationalError as error:
                raise OSError(error) from error

        with until("PostgreSQL", 300, connect) as connection:
            for name in names:
                if drop:
                    connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
                connection.execute(f"CREATE DATABASE {name}")

    def postgres(self, name: str, *words: str) -> None:
        """A client of PostgreSQL, such as pg_dump, with the server's address and password."""
        given = {"PGHOST": "127.0.0.1", "PGPORT": str(self.database), "PGUSER": "postgres", "PGPASSWORD": PASSWORD}
        done = subprocess.run(
            [str(program(name)), *words], env={**os.environ, **given}, capture_output=True, text=True, cwd=self.folder
        )
        assert done.returncode == 0 and not done.stderr, done.stderr

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
            with contextlib.suppress(psutil.NoSuchProcess):  # it, or what it forked, has just ended by itself
                if "metapeft.stages" not in " ".join(member.cmdline()):
                    member.kill()


def program(name: str) -> Path:
    """A program of PostgreSQL's server package, which Debian keeps off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    place = str(found[-1]) if found else shutil.which(name)
    assert place and shutil.which("redis-server"), "apt-get install postgresql redis-server"
    return Path(place).resolve()


def weed() -> Path:
    """SeaweedFS, which `make test-platform` puts beside its packages."""
    folders = [Path(part) / "bin" for part in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = next((folder / "weed" for folder in folders if (folder / "weed").is_file()), None)
    assert found, "tests/platform/requirements.txt is not installed; run `make test-platform`"
    return found.absolute()
