"""The HTTP API against its own description: schemathesis asks a real server whatever the schema allows, and what not.

Every status, content type and body must be one that /openapi.json describes; no answer may be 5xx, and what the schema
forbids must be refused. What a schema cannot say (which models there are, that a prompt must fit the context) may be
refused too, so `positive_data_acceptance` is left out.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from metapeft import backbones
from metapeft.settings import load_settings
from tests.backbones.tiny import tiny_folder
from tests.serving.made import Server, register, save, serving

schemathesis = pytest.importorskip("schemathesis")
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]
REQUESTS = int(os.environ.get("METAPEFT_REQUESTS", "40"))  # per operation and kind


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("api")
    shutil.copytree(tiny_folder("llama"), home / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(home))
        chosen = load_settings(backbone=str(home / "tiny"))
        folder = save(home / "made", backbones.load(chosen.backbone), "lora")
        register(chosen, folder, "alpha", "lora")
        with serving(home, chosen.backbone, "--timeout", "60", "--poll-seconds", "3600") as running:
            yield running


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def operations(schema: Any) -> dict[str, Any]:
    return {f"{o.method.upper()} {o.path}": o for o in (result.ok() for result in schema.get_all_operations())}


NAMES = [
    "GET /healthz", "GET /readyz", "GET /metrics", "GET /v1/models", "GET /v1/models/{id}", "POST /v1/deploy",
    "GET /v1/deployments", "GET /v1/overview", "POST /v1/chat/completions", "POST /v1/completions",
    "POST /v1/classify", "POST /v1/select", "GET /v1/select/{id}",
]  # fmt: skip


def test_every_operation_is_asked(schema: Any) -> None:
    assert set(NAMES) <= set(operations(schema))


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("name", NAMES)
def test_the_server_keeps_its_schema(schema: Any, server: Server, name: str, mode: str, figure: Any) -> None:
    operation = operations(schema)[name]
    kind = schemathesis.GenerationMode(mode)
    known = ("task/alpha@champion", "task/alpha", "tiny")
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=REQUESTS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        derandomize=True,
    )
    @given(operation.as_strategy(generation_mode=kind))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and mode == "positive":
            case.body["model"] = known[len(case.body["model"]) % len(known)]
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 20)
        excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
        answer = case.call(timeout=120)
        statuses[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=excluded)

    try:
        ask()
    except Exception as error:
        if "unsatisfiable" in str(error).lower() or type(error).__name__ in ("Unsatisfiable", "SkipTest"):
            pytest.skip(f"{name} takes nothing that could be wrong")
        raise
    found = ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items()))
    figure(f"{name}, {mode} data: {sum(statuses.values())} requests ({found})")
    assert server.process.poll() is None
