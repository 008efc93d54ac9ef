"""docker-compose.yaml: pinned, on the loopback only, health-checked, without a secret in it."""

from __future__ import annotations

import base64
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).resolve().parents[1]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Healthcheck(Strict):
    test: list[str] = Field(min_length=2)
    interval: str = Field(pattern=r"^\d+s$")
    timeout: str = Field(pattern=r"^\d+s$")
    retries: int = Field(gt=0)
    start_period: str | None = Field(None, pattern=r"^\d+s$")


class Condition(Strict):
    condition: Literal["service_healthy", "service_completed_successfully"]


class Build(Strict):
    context: str
    dockerfile: str


class Service(Strict):
    """The part of the Compose specification that the file uses (https://github.com/compose-spec/compose-spec)."""

    image: str = Field(pattern=r"^[\w./-]+:\d+\.[\w.-]+$")  # a version, never `latest`
    build: Build | None = None
    restart: Literal["no", "unless-stopped"]
    command: list[str] | None = None
    environment: dict[str, str] = {}
    ports: list[str] = []
    volumes: list[str] = []
    depends_on: dict[str, Condition] = {}
    healthcheck: Healthcheck | None = None
    init: bool = False
    stop_grace_period: str | None = None


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yaml").read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Service]:
    return {name: Service.model_validate(service) for name, service in compose["services"].items()}


def test_every_lasting_service_is_health_checked_and_every_dependency_exists(services: dict[str, Service]) -> None:
    for name, service in services.items():
        once = service.restart == "no"
        assert (service.healthcheck is None) == once, name
        for other, wanted in service.depends_on.items():
            finishes = services[other].restart == "no"
            assert (wanted.condition == "service_completed_successfully") == finishes, (name, other)


def test_ports_are_bound_to_the_loopback_only(services: dict[str, Service]) -> None:
    ports = [port for service in services.values() for port in service.ports]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_volumes_are_declared_or_files_of_the_project(compose: dict[str, Any], services: dict[str, Service]) -> None:
    for service in services.values():
        for volume in service.volumes:
            source = volume.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith("./") else source in compose["volumes"]
        if service.build:
            assert (ROOT / service.build.context / service.build.dockerfile).is_file()


def test_the_script_makes_every_secret_that_the_file_asks_for(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    for _ in range(2):  # a second run changes nothing
        subprocess.run([sys.executable, str(ROOT / "docker/make_env.py"), str(env)], check=True, capture_output=True)
        text = env.read_text()
    assert text == env.read_text()
    made = dict(line.split("=", 1) for line in text.splitlines())
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yaml").read_text()))
    assert asked == set(made) and len(set(made.values())) == len(made)
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    assert len(made["AIRFLOW_JWT_SECRET"]) >= 64
    assert len(base64.urlsafe_b64decode(made["AIRFLOW_FERNET_KEY"])) == 32
    assert ".env" in (ROOT / ".gitignore").read_text().split() or "/.env" in (ROOT / ".gitignore").read_text().split()


def test_every_part_of_the_platform_is_there(services: dict[str, Service]) -> None:
    """Deadlines need the triggerer; sweeps of several workers a database that all of them reach."""
    lasting = {name for name, service in services.items() if service.restart != "no"}
    airflow = {"api-server", "scheduler", "dag-processor", "triggerer", "worker"}
    assert lasting == airflow | {"postgres", "redis", "mlflow", "serving"}
    made = set(re.findall(r"CREATE DATABASE (\w+)", (ROOT / "docker/databases.sql").read_text()))
    used = set(re.findall(r"@postgres/(\w+)", (ROOT / "docker-compose.yaml").read_text()))
    assert used == made | {services["postgres"].environment["POSTGRES_DB"]}
    for name in airflow:
        assert services[name].environment == services["scheduler"].environment, name


def test_commands_exist(services: dict[str, Service]) -> None:
    """Every `metapeft` option that the file uses is one of the command line's."""
    from typer.main import get_command

    from metapeft.cli import app

    for service in services.values():
        if service.command and service.command[0] == "metapeft":
            command = get_command(app).commands[service.command[1]]  # type: ignore[attr-defined]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in service.command if word.startswith("--")} <= known


def test_no_secret_stands_in_the_file(services: dict[str, Service]) -> None:
    for service in services.values():
        for key, value in service.environment.items():
            if re.search(r"PASSWORD$|SECRET|FERNET|REDISCLI_AUTH", key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), key


def test_airflow_options_exist(services: dict[str, Service]) -> None:
    """Every AIRFLOW__SECTION__KEY is an option of this Airflow (the Celery section comes with its provider)."""
    import airflow

    known = yaml.safe_load((Path(airflow.__file__).parent / "config_templates/config.yml").read_text())
    for key in services["scheduler"].environment:
        if key.startswith("AIRFLOW__") and not key.startswith("AIRFLOW__CELERY__"):
            _, section, option = key.split("__")
            assert option.lower() in known[section.lower()]["options"], key
