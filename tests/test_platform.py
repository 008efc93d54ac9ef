"""docker-compose.yaml: pinned, on the loopback only, health-checked, without a secret in it."""

from __future__ import annotations

import base64
import re
import shutil
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


class Secret(Strict):
    source: str
    target: str


class Service(Strict):
    """The part of the Compose specification that the file uses (https://github.com/compose-spec/compose-spec)."""

    image: str = Field(pattern=r"^[\w./-]+:v?\d+\.[\w.-]+$")  # a version, never `latest`
    build: Build | None = None
    user: str | None = None
    restart: Literal["no", "unless-stopped"]
    command: list[str] | None = None
    environment: dict[str, str] = {}
    ports: list[str] = []
    volumes: list[str] = []
    secrets: list[Secret] = []
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


def test_every_file_that_it_names_exists(compose: dict[str, Any], services: dict[str, Service]) -> None:
    """Mounted files and folders, scripts that commands run, the image's recipe; other volumes are declared."""
    used = set()
    for name, service in services.items():
        for volume in service.volumes:
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                assert (ROOT / source).exists(), (name, volume)
                assert "." in target.rpartition("/")[2] or (ROOT / source).is_dir(), "Docker would make a folder"
            else:
                used.add(source)
        for word in service.command or []:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), (name, word)
        for secret in service.secrets:
            assert secret.source in compose["secrets"]
        if service.build:
            assert (ROOT / service.build.context / service.build.dockerfile).is_file()
            assert service.user, "an image of ours runs as who owns the checkout"
    assert used == set(compose["volumes"])


def test_every_environment_key_that_it_names_is_read(services: dict[str, Service]) -> None:
    """By our code, where it is ours; a misspelt one would be silently without effect."""
    code = "".join(path.read_text() for folder in ("metapeft", "docker") for path in (ROOT / folder).rglob("*.py"))
    names = {key for service in services.values() if service.build for key in service.environment}
    foreign = ("AIRFLOW_", "MLFLOW_", "AWS_")
    for key in names:
        assert key.startswith(foreign) or re.search(rf"\b{key}\b", code), key
    import mlflow

    package = Path(mlflow.__file__).parent
    text = "".join((package / name).read_text() for name in ("environment_variables.py", "cli/__init__.py"))
    for key in names:
        assert not key.startswith("MLFLOW_") or key in text, key


def test_prometheus_is_given_what_its_configuration_asks_for(services: dict[str, Service]) -> None:
    """Its key, its rules, and hosts and ports of services that are there."""
    own = services["prometheus"]
    inside = {volume.split(":")[1]: ROOT / volume.split(":")[0] for volume in own.volumes if volume.startswith(".")}
    given = yaml.safe_load(inside["/etc/prometheus/prometheus.yml"].read_text())
    for rules in given["rule_files"]:
        assert f"/etc/prometheus/{rules}" in inside
    keys = {job["authorization"]["credentials_file"] for job in given["scrape_configs"] if "authorization" in job}
    assert keys == {secret.target for secret in own.secrets}
    configs = [*given["scrape_configs"], *given["alerting"]["alertmanagers"]]
    targets = {t for entry in configs for group in entry["static_configs"] for t in group["targets"]}
    for host, port in (target.split(":") for target in targets):
        if host != "127.0.0.1":
            assert any(p.endswith(f":{port}") for p in services[host].ports), (host, port)


def test_grafana_finds_its_dashboards(services: dict[str, Service]) -> None:
    inside = {v.split(":")[1]: ROOT / v.split(":")[0] for v in services["grafana"].volumes if v.startswith(".")}
    provisioning = inside["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load(next((provisioning / "dashboards").glob("*.yml")).read_text())["providers"]
    assert list(inside[provider["options"]["path"]].glob("*.json"))
    (source,) = yaml.safe_load(next((provisioning / "datasources").glob("*.yml")).read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(p.endswith(f":{port}") for p in services[host].ports)


def test_the_buckets_that_are_used_are_made(services: dict[str, Service]) -> None:
    made = set((services["store-setup"].command or [])[2:])
    texts = [" ".join(services["mlflow"].command or []), (ROOT / "docker/dvc.conf").read_text()]
    assert {bucket for text in texts for bucket in re.findall(r"s3://(\w+)", text)} == made


def test_the_script_makes_every_secret_that_the_file_asks_for(tmp_path: Path) -> None:
    env = tmp_path / ".env"

    def make() -> str:
        subprocess.run([sys.executable, str(ROOT / "docker/make_env.py"), str(env)], check=True, capture_output=True)
        return env.read_text()

    text = make()
    assert make() == text, "a second run changes nothing"
    older = "".join(line for line in text.splitlines(True) if not line.startswith("S3_SECRET_KEY="))
    env.write_text(older)
    assert make().startswith(older) and "S3_SECRET_KEY=" in env.read_text(), "an older file gets what it lacks"
    env.write_text(text.replace("GRAFANA_PASSWORD=", "#", 1) + "GRAFANA_PASSWORD=\n")
    assert re.findall("^GRAFANA_PASSWORD=(.*)$", make(), re.M)[0], "a name without a value is no secret"
    made = dict(line.split("=", 1) for line in text.splitlines())
    compose = (ROOT / "docker-compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", compose)) | set(re.findall(r"environment: ([A-Z_]+)$", compose, re.M))
    assert asked == set(made) and len(set(made.values())) == len(made)
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    assert len(made["AIRFLOW_JWT_SECRET"]) >= 64
    assert len(base64.urlsafe_b64decode(made["AIRFLOW_FERNET_KEY"])) == 32
    assert ".env" in (ROOT / ".gitignore").read_text().split() or "/.env" in (ROOT / ".gitignore").read_text().split()


def test_every_part_of_the_platform_is_there(services: dict[str, Service]) -> None:
    """Deadlines need the triggerer; sweeps of several workers a database that all of them reach."""
    lasting = {name for name, service in services.items() if service.restart != "no"}
    airflow = {"api-server", "scheduler", "dag-processor", "triggerer", "worker"}
    assert lasting == airflow | {
        *("postgres", "redis", "seaweedfs", "mlflow", "serving"),
        *("prometheus", "alertmanager", "grafana"),
    }
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
            if re.search(r"PASSWORD$|SECRET|FERNET|REDISCLI_AUTH|ACCESS_KEY|METRICS_KEY|SERVER_KEY", key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), key


def test_docker_compose_itself_reads_it(tmp_path: Path) -> None:
    """Where Docker's client is installed; no engine is needed."""
    command = [*(["docker", "compose"] if has_compose() else []), "--env-file", str(tmp_path / ".env")]
    if command[0] != "docker":
        pytest.skip("the Compose plugin is not installed")
    subprocess.run([sys.executable, str(ROOT / "docker/make_env.py"), str(tmp_path / ".env")], check=True)
    done = subprocess.run([*command, "-f", "docker-compose.yaml", "config", "--quiet"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def has_compose() -> bool:
    found = shutil.which("docker")
    return found is not None and subprocess.run([found, "compose", "version"], capture_output=True).returncode == 0


def test_airflow_options_exist(services: dict[str, Service]) -> None:
    """Every AIRFLOW__SECTION__KEY is an option of this Airflow (the Celery section comes with its provider)."""
    import airflow

    known = yaml.safe_load((Path(airflow.__file__).parent / "config_templates/config.yml").read_text())
    for key in services["scheduler"].environment:
        if key.startswith("AIRFLOW__") and not key.startswith("AIRFLOW__CELERY__"):
            _, section, option = key.split("__")
            assert option.lower() in known[section.lower()]["options"], key
