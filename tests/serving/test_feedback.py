"""POST /v1/feedback at a real server: what was answered, whether it was right, and what is kept of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from metapeft import backbones
from metapeft.monitoring import feedback, served
from metapeft.settings import load_settings
from tests.backbones.tiny import tiny_folder
from tests.serving.made import LABELS, Server, register_all, save, serving


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_folder("llama"), home / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(home))
        settings = load_settings(backbone=str(home / "tiny"))
        backbone = backbones.load(settings.backbone)
        register_all(settings, [(save(home / "made" / "alpha", backbone, "lora", 0), "alpha", "lora", 0.9, 0)])
        yield home


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    with serving(place, str(place / "tiny"), "--timeout", "60", "--poll-seconds", "3600") as running:
        yield running


@pytest.fixture(autouse=True)
def same_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(place))


def test_an_answer_is_judged_by_its_id(server: Server, place: Path) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        asked = {"model": "task/alpha", "input": ["a private text", "another"], "labels": list(LABELS)}
        told = client.post("/v1/classify", json=asked).json()
        label = told["data"][1]["label"]
        said = client.post("/v1/feedback", json={"id": told["id"], "index": 1, "correct": f" {label.upper()} "})
        assert said.status_code == 200 and said.json()["verdict"] == "right"
        version = said.json()["model"]
        assert version.endswith("@1"), "the version that answered, not the alias that was asked for"
        other = next(name for name in LABELS if name != label)
        wrong = client.post("/v1/feedback", json={"id": told["id"], "index": 1, "correct": other}).json()
        assert wrong["verdict"] == "wrong"
        written = client.post("/v1/completions", json={"model": "task/alpha", "prompt": "abc", "max_tokens": 4}).json()
        answer = written["choices"][0]["text"]
        done = client.post("/v1/feedback", json={"id": written["id"], "correct": answer or "x"}).json()
        assert done["verdict"] == ("right" if answer else "wrong")
        text = client.get("/metrics").text
    assert f'metapeft_feedback_total{{model="{version}",verdict="wrong"}} 1.0' in text
    found = feedback.read()
    assert [f.verdict for f in found if f.id.startswith(told["id"])] == ["wrong"], "judged twice: the last word"
    assert "private" not in (place / "serving" / "feedback.jsonl").read_text()
    assert served.counted(text)["requests"] >= 5


def test_a_stream_is_judged_by_rating_or_with_its_text(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"model": "task/alpha", "prompt": "abc", "max_tokens": 4, "stream": True}
        lines = client.post("/v1/completions", json=body).text
        id = lines.split('"id": "')[1].split('"')[0]
        assert client.post("/v1/feedback", json={"id": id, "rating": "wrong"}).json()["verdict"] == "wrong"
        refused = client.post("/v1/feedback", json={"id": id, "correct": "x"})
        assert refused.status_code == 400 and "send answer too" in refused.json()["error"]["message"]
        sent = {"id": id, "answer": "x", "correct": "X"}
        assert client.post("/v1/feedback", json=sent).json()["verdict"] == "right"


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"rating": "right"}, 400, "id, or the model"),
        ({"id": "a"}, 400, "either rating or correct"),
        ({"id": "a", "rating": "right", "correct": "x"}, 400, "either rating or correct"),
        ({"id": "unknown", "rating": "right"}, 400, "does not remember"),
        ({"model": "task/alpha", "correct": "x"}, 400, "needs answer"),
        ({"model": "task/nothing", "rating": "right"}, 404, "there is no model"),
        ({"model": "task/alpha", "rating": "maybe"}, 400, "rating"),
    ],
)
def test_what_cannot_be_judged_is_said(server: Server, body: dict[str, str], status: int, part: str) -> None:
    before = len(feedback.read())
    done = httpx.post(f"{server.url}/v1/feedback", json=body, timeout=60)
    assert done.status_code == status and part in done.json()["error"]["message"]
    assert len(feedback.read()) == before


def test_without_an_id_the_model_is_enough(server: Server) -> None:
    done = httpx.post(f"{server.url}/v1/feedback", json={"model": "task/alpha@1", "rating": "right"}, timeout=60)
    assert done.status_code == 200 and done.json()["model"].endswith("@1")
