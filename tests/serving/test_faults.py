"""What a server must survive: failures that nobody expected, and input that is meant to hurt. In one process."""

from __future__ import annotations

import io
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from metapeft.errors import UserError
from metapeft.profiling import cache
from metapeft.serving import feedback, keys, openai, select
from metapeft.serving.app import Service, create_app, is_local
from metapeft.serving.engine import Classification, Engine, Limits
from metapeft.serving.generate import Token
from metapeft.serving.keys import Keyring
from metapeft.serving.metrics import Metrics
from metapeft.serving.registry import Registry, UnknownModel
from metapeft.serving.score import Answers
from metapeft.serving.select import Job, Selector
from metapeft.serving.server import log, url_of
from metapeft.settings import load_settings
from metapeft.tracking.models import Model
from tests.backbones.tiny import CONTEXT, tiny, tiny_folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(tmp_path_factory.mktemp("home")))
        engine = Engine(tiny("llama"), Limits())
        engine.start()
        registry = Registry(engine, load_settings(backbone=engine.backbone.id))
        registry.ready.set()
        registry.looked = True
        yield Service(engine, registry, Selector(engine.backbone.id), Keyring(), Metrics(engine, registry), log)
        engine.stop(20)


@pytest.fixture(autouse=True)
def same_home(home: Path) -> None:
    """A METAPEFT_HOME of the test's own."""


@pytest.fixture
def client(service: Service) -> TestClient:
    app = create_app(service)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("a private text")

    return TestClient(app, base_url="http://localhost")


def classify(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/classify", json={"model": backbone(client), "template": "{text}", "input": "abc", **body})


def backbone(client: TestClient) -> str:
    return str(client.get("/v1/models").json()["data"][0]["id"])


def said(answer: Any) -> str:
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


def test_what_nobody_expected_is_answered_counted_and_logged(client: TestClient) -> None:
    with redirect_stderr(io.StringIO()) as log:
        answer = client.get("/broken")
    assert answer.status_code == 500 and "x-request-id" in answer.headers
    problem = {"message": "internal error (RuntimeError)", "type": "server_error", "param": None, "code": None}
    assert answer.json() == {"error": problem}
    [record] = map(json.loads, log.getvalue().splitlines())
    assert record["status"] == 500 and record["id"] == answer.headers["x-request-id"]
    assert record["error"].startswith("RuntimeError < test_faults.py:") and "private" not in log.getvalue()
    assert 'metapeft_http_requests_total{route="/broken",status="500"} 1.0' in client.get("/metrics").text


def test_selections_that_take_long_keep_no_completion_waiting(service: Service) -> None:
    with TestClient(create_app(service), base_url="http://localhost") as client:  # one event loop for all
        body = {"model": backbone(client), "prompt": "abc", "max_tokens": 1}
        with ThreadPoolExecutor(41) as pool:
            with service.selector._lock:
                selections = [pool.submit(client.post, "/v1/select", json={"task": "sms_spam"}) for _ in range(40)]
                time.sleep(0.3)  # until they wait for the lock
                assert pool.submit(client.post, "/v1/completions", json=body).result(20).status_code == 200
            assert {selection.result(20).status_code for selection in selections} == {202}


def test_more_answers_than_may_ever_wait_are_refused_for_good(client: TestClient) -> None:
    body = {"model": backbone(client), "prompt": ["abc"] * 64, "n": 8, "max_tokens": 1}
    assert "512 answers at once, and 256 may wait" in said(client.post("/v1/completions", json=body))


@pytest.mark.parametrize("name", ["max_seconds", "max_memory_mb"])
def test_a_limit_must_be_a_finite_number(client: TestClient, name: str) -> None:
    body = f'{{"task": "sms_spam", "{name}": 1e999}}'
    answer = client.post("/v1/select", content=body, headers={"Content-Type": "application/json"})
    assert "finite" in said(answer)


def ended(selector: Selector, job: Job) -> Job:
    until = time.monotonic() + 20
    while (now := selector.get(job.id)) is not None and now.state in ("queued", "running"):
        assert time.monotonic() < until, now
        time.sleep(0.01)
    assert now is not None
    return now


def test_a_full_disk_fails_a_selection_and_not_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    selector, full, write = Selector(str(tiny_folder("llama"))), threading.Event(), cache.write

    def written(path: Path, record: dict[str, Any]) -> None:
        if full.is_set():
            raise UserError("the disk is full")
        write(path, record)

    def measured(request: dict[str, Any]) -> tuple[dict[str, Any], str, bool]:
        if request["task"] == "trec6":
            full.set()  # while it is being measured
        return {"best": 1}, "", False

    monkeypatch.setattr(select, "write_record", written)
    monkeypatch.setattr(selector, "_measure", measured)
    selector.start()
    try:
        failed = ended(selector, selector.ask({"task": "trec6"}))
        assert failed.state == "failed" and "the disk is full" in failed.error
        with pytest.raises(UserError, match="the disk is full"):
            selector.ask({"task": "sms_spam"})
        full.clear()
        assert ended(selector, selector.ask({"task": "sms_spam"})).state == "done"
    finally:
        selector.stop()


def test_a_selection_whose_task_cannot_be_downloaded_now(
    service: Service, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Nobody's mistake: 503, and when to ask again."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    selector = Selector(service.selector.backbone)
    selector.start()
    try:
        with TestClient(create_app(replace(service, selector=selector)), base_url="http://localhost") as client:
            answer = client.post("/v1/select", json={"task": "sms_spam", "wait": 60})
    finally:
        selector.stop()
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "60"
    assert "cannot download" in answer.json()["error"]["message"]


def test_what_could_not_be_written_is_not_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    selector = Selector(str(tiny_folder("llama")))
    with monkeypatch.context() as patch:
        patch.setattr(select, "write_record", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
        with pytest.raises(UserError, match="the disk is full"):
            selector.ask({"task": "sms_spam"})
    assert selector.waiting == 0 and selector.recent() == []
    assert selector.ask({"task": "sms_spam"}).state == "queued" and selector.waiting == 1


def test_labels_have_a_length_and_can_be_told_apart(client: TestClient) -> None:
    assert "65 tokens" in said(classify(client, labels=["yes", "n" * 64]))
    assert classify(client, labels=["yes", "n" * 60]).status_code == 200
    assert "cannot be told" in said(classify(client, labels=["yes", "yes<|im_end|>"]))


def test_shared_beginnings_cost_no_more_than_their_length() -> None:
    begin = time.process_time()
    stem = tuple(range(2000))
    assert Answers.of([(*stem, 1), (*stem, 2)]).paths == (stem,)
    many = Answers.of([(*range(60), n, n + 1, 9) for n in range(200)])
    assert many.paths == (tuple(range(60)),) and set(many.decided) == {61} and many.longest == 60
    assert time.process_time() - begin < 2


def test_the_longest_path_must_fit_behind_the_prompt(client: TestClient) -> None:
    labels = ["n" * 60 + "a", "n" * 60 + "b"]
    assert "context" in said(classify(client, labels=labels, input="x" * (CONTEXT - 61)))
    assert classify(client, labels=labels, input="x" * (CONTEXT - 62)).status_code == 200


@pytest.mark.parametrize("native", [True, False])
def test_questions_are_weighed_in_groups_that_the_cache_holds(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny("llama"), Limits(cache_mb=0.1), native=native)  # some 100 tokens
    answers = Answers.of([(1, 2, 3), (1, 4), (5,)])
    prompts = [[7] * n for n in (30, 1, 40, 20, 30, 2, 60, 9)]
    engine.start()
    roomy = [weighed(engine, [prompt], answers)[0] for prompt in prompts]
    groups: list[int] = []
    batch = engine.batch

    def counted(rows: Any) -> Any:
        lengths = [row.length for row in rows]
        groups.append(sum(lengths) if native else len(lengths) * max(lengths))
        return batch(rows)

    monkeypatch.setattr(engine, "batch", counted)
    for alone, together in zip(roomy, weighed(engine, prompts, answers), strict=True):
        assert together == pytest.approx(alone, abs=1e-4)
    assert max(groups) <= engine.places and 1 < len(groups) < len(prompts)
    long = Classification(None, [[7] * 3, [7] * engine.places], answers, lambda _: None, time.monotonic() + 9)
    with pytest.raises(UserError, match="do not fit"):
        engine.submit(long)
    engine.stop(20)


def weighed(engine: Engine, prompts: list[list[int]], answers: Answers) -> Any:
    told: queue.Queue[Any] = queue.Queue()
    engine.submit(Classification(None, prompts, answers, told.put, time.monotonic() + 60))
    return told.get(timeout=60)


def test_text_that_no_tokenizer_takes_is_refused(client: TestClient) -> None:
    half, model = "\ud800", backbone(client)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", {"messages": [{"role": "user", "content": half}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": half}]}]}),
        ("completions", {"prompt": half}),
        ("completions", {"prompt": "abc", "stop": half}),
        ("classify", {"input": half, "labels": ["yes", "no"]}),
        ("classify", {"input": "abc", "labels": ["yes", half]}),
        ("feedback", {"id": "x", "answer": half, "correct": "x"}),
        ("select", {"rows": [{"text": half, "label": "x"}]}),
    ]
    for route, body in bodies:
        told = json.dumps({"model": model, "max_tokens": 1, **body})
        answer = client.post(f"/v1/{route}", content=told, headers={"Content-Type": "application/json"})
        assert "Unicode" in said(answer)


def test_a_version_of_thousands_of_digits_is_no_version(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: dict[str, Any] = dict.fromkeys(
        ("name", "task_version", "backbone", "method", "metric", "trial", "dvc_id", "run_id"), "x"
    )
    known = Model(
        **texts,
        version=1,
        aliases=(),
        task="alpha",
        configuration={},
        score=0.5,
        standard_error=0.1,
        untuned_score=None,
        source="",
        created=0,
    )
    monkeypatch.setattr(service.registry, "models", (known,))
    for which in ("9" * 5000, "v" + "9" * 5000):
        with pytest.raises(UnknownModel, match="no version"):
            service.registry.resolve(f"task/alpha@{which}")


def test_a_rating_is_of_an_answer_that_was_given(client: TestClient) -> None:
    id = classify(client, labels=["yes", "no"], input=["abc", "def"]).json()["id"]
    assert client.post("/v1/feedback", json={"id": id, "index": 1, "rating": "right"}).status_code == 200
    assert "no answer 2" in said(client.post("/v1/feedback", json={"id": id, "index": 2, "rating": "right"}))
    model = backbone(client)
    body = {"model": model, "prompt": "abc", "max_tokens": 1, "n": 2, "stream": True}
    id = client.post("/v1/completions", json=body).text.split('"id": "')[1].split('"')[0]
    assert client.post("/v1/feedback", json={"id": id, "index": 1, "rating": "wrong"}).status_code == 200
    assert "no answer 2" in said(client.post("/v1/feedback", json={"id": id, "index": 2, "rating": "wrong"}))
    lost = {"id": "forgotten", "model": model, "index": 3, "correct": "x"}
    assert "send answer too" in said(client.post("/v1/feedback", json=lost))


def test_addresses_of_this_machine() -> None:
    assert url_of("::1", 8000) == "http://[::1]:8000" and url_of("::", 1) == "http://localhost:1"
    assert url_of("127.0.0.1", 80) == "http://127.0.0.1:80" and url_of("0.0.0.0", 1) == "http://localhost:1"
    assert all(map(is_local, (b"[::1]:8000", b"[::1]", b"localhost:1", b"127.0.0.1")))
    assert not any(map(is_local, (b"[::2]:8000", b"[::1].evil.example", b"evil.example:80")))


def test_a_stranger_is_refused_before_his_body_is_read(client: TestClient, service: Service) -> None:
    _, text = keys.create("one")
    odd = {"content": b"{", "headers": {"Content-Type": "application/json"}}
    try:
        for route in ("/v1/completions", "/v1/select", "/v1/feedback", "/v1/deploy"):
            answer = client.post(route, **odd)  # type: ignore[arg-type]
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
        known = {"Authorization": f"Bearer {text}", "Content-Type": "application/json"}
        assert client.post("/v1/completions", content=b"{", headers=known).status_code == 400
        own = known | {"Authorization": f"Bearer {service.token}"}
        assert client.post("/v1/completions", content=b"{", headers=own).status_code == 400
    finally:
        service.keyring._needed = False


def test_a_text_that_cannot_fit_is_not_tokenized(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenized(*_: Any) -> None:
        raise AssertionError("it was")

    for module in ("metapeft.serving.app", "metapeft.serving.openai"):
        monkeypatch.setattr(f"{module}.prompt_ids", tokenized)
    long = "a" * 3_000_000
    bodies = {
        "completions": {"prompt": ["b", long]},
        "chat/completions": {"messages": [{"role": "user", "content": long}]},
    }
    bodies["classify"] = {"input": long, "labels": ["x", "y"]}
    for route, body in bodies.items():
        found = said(client.post(f"/v1/{route}", json={"model": backbone(client), **body}))
        assert "3000000 characters" in found and str(CONTEXT) in found


def test_only_whole_tasks_may_be_large(client: TestClient) -> None:
    body = b'{"model": "' + b"x" * (5 * 2**20)
    kind = {"Content-Type": "application/json"}
    for route, status in (("/v1/completions", 413), ("/v1/select", 400)):
        answer = client.post(route, content=body, headers=kind)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


def test_every_prompt_has_its_own_room(client: TestClient) -> None:
    long = "b" * (CONTEXT - 2)
    body = {"model": backbone(client), "prompt": ["a", long], "max_tokens": None}
    both = client.post("/v1/completions", json=body).json()
    alone = client.post("/v1/completions", json={**body, "prompt": "a"}).json()
    assert both["choices"][0]["text"] == alone["choices"][0]["text"]
    assert both["usage"]["completion_tokens"] == alone["usage"]["completion_tokens"] + 2


def test_token_ids_may_be_added_tokens(client: TestClient, service: Service) -> None:
    tokenizer = service.engine.backbone.tokenizer
    last = len(tokenizer.get_vocab()) - 1
    assert last >= tokenizer.vocab_size, "this tokenizer has added tokens"
    body = {"model": backbone(client), "max_tokens": 1}
    assert client.post("/v1/completions", json={**body, "prompt": [last, 5]}).status_code == 200
    assert str(last) in said(client.post("/v1/completions", json={**body, "prompt": [last + 1]}))


HARMLESS = {"stream": None, "tool_choice": "none", "modalities": ["text"], "top_p": 0, "seed": -1, "top_k": -1}


def test_what_changes_no_answer_is_let_through_and_what_would_is_refused(client: TestClient) -> None:
    body = {"model": backbone(client), "messages": [{"role": "user", "content": "abc"}], "max_tokens": 2}
    usual = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert client.post("/v1/chat/completions", json={**body, **HARMLESS}).json()["choices"] == usual
    for name, value in (("top_k", 5), ("repetition_penalty", 1.2), ("min_p", 0.1), ("tool_choice", "auto")):
        assert name in said(client.post("/v1/chat/completions", json={**body, name: value}))


def test_a_stream_that_breaks_is_logged_and_counted(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, steps = service.engine, []
    real = engine._write

    def write(*arguments: Any, **more: Any) -> None:
        steps.append(1)
        if len(steps) > 3:
            raise RuntimeError("a private text")
        real(*arguments, **more)

    monkeypatch.setattr(engine, "_write", write)
    body = {"model": backbone(client), "prompt": "abc", "max_tokens": 40, "stream": True}
    with redirect_stderr(io.StringIO()) as log:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200 and "internal error (RuntimeError)" in answer.text
    [record] = [r for r in map(json.loads, log.getvalue().splitlines()) if r["event"] == "request"]
    assert record["status"] == 500 and record["error"].startswith("RuntimeError < ")
    assert "private" not in log.getvalue() + answer.text
    assert 'route="/v1/completions",status="500"' in client.get("/metrics").text


def test_log_probabilities_tell_the_text_byte_by_byte(service: Service) -> None:
    tokenizer = service.engine.backbone.tokenizer
    text = "né 🦜."
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = [Token(id, -1.0, ()) for id in ids]
    entries = openai.chat_logprobs(tokens, tokenizer)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
    offsets = openai.completion_logprobs(tokens, tokenizer, 0)["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] <= len(text) - 1


def test_the_memory_of_answers_is_bounded_by_answers() -> None:
    given = feedback.Given()
    for n in range(1000):
        given.remember(f"id{n}", "a@1", ["x"] * 256)
    assert sum(len(digests) for _, digests in given._kept.values()) <= feedback.KEPT
    assert "id999" in given._kept


def test_keys_that_cannot_be_read_open_nothing_and_tell_no_path(
    client: TestClient, service: Service, home: Path
) -> None:
    keys.path().parent.mkdir(parents=True, exist_ok=True)
    keys.path().write_text("{}")
    try:
        with redirect_stderr(io.StringIO()) as log:
            answers = [client.get("/v1/models"), client.post("/v1/completions", content=b"{")]
    finally:
        keys.path().unlink()
        service.keyring._needed = False
    for answer in answers:
        assert answer.status_code == 503 and str(home) not in answer.text
        found = answer.json()["error"]
        assert (found["message"], found["type"]) == ("the server cannot read its keys now", "server_error")
    assert log.getvalue().count("keys.json is damaged") == 2
