"""A real server process with a small random backbone and a real registry, asked by real clients."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from safetensors.numpy import load_file, save_file

from metapeft import backbones
from metapeft.backbones import Backbone
from metapeft.peft import adapters, folder
from metapeft.runtime import mx
from metapeft.serving import server as serving_module
from metapeft.serving.server import configured
from metapeft.settings import Settings, load_settings
from metapeft.tracking import models
from tests.backbones.tiny import tiny_folder
from tests.serving.made import LABELS, TEMPLATE, Server, register, register_all, save, serving

METHODS = {"alpha": "lora", "beta": "prompt", "gamma": "prefix", "delta": "adalora"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """METAPEFT_HOME with a registry of four adapters, one of them with two versions."""
    home = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_folder("llama"), home / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(home))
        served = settings_of(home)
        backbone = backbones.load(served.backbone)
        made = [
            (save(home / "made" / name, backbone, method, seed), name, method, 0.9, seed)
            for seed, (name, method) in enumerate(METHODS.items())
        ]
        made.append((save(home / "made" / "alpha-2", backbone, "lora", 7), "alpha", "lora", 0.5, 7))
        register_all(served, made)
        yield home


def settings_of(home: Path) -> Settings:
    return load_settings(backbone=str(home / "tiny"))


@pytest.fixture(autouse=True)
def same_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(place))


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    with serving(place, str(place / "tiny"), "--timeout", "60", "--poll-seconds", "3600") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def expected(place: Path, name: str | None, prompt: str, tokens: int) -> str:
    """What an adapter writes, greedily, by mlx-lm alone."""
    backbone: Backbone = backbones.load(str(place / "tiny"))
    model = backbone.model
    if name:
        model = adapters.with_adapter(model, adapters.load(place / "made" / name, model))
    ids = []
    for token, _ in generate_step(mx.array(backbone.tokenizer.encode(prompt)), model, max_tokens=tokens):
        if int(token) in backbone.tokenizer.eos_token_ids:
            break
        ids.append(int(token))
    return str(backbone.tokenizer.decode(ids))


def test_models_are_the_backbone_and_its_adapters(client: openai.OpenAI) -> None:
    ids = {model.id for model in client.models.list()}
    assert {"tiny", "task/alpha@champion", "task/alpha@1", "task/alpha@2", "task/alpha@challenger"} <= ids
    assert client.models.retrieve("task/beta@champion").model_dump()["method"] == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("task/nothing@champion")


def test_every_adapter_answers_as_itself_also_all_at_once(client: openai.OpenAI, place: Path) -> None:
    prompt = "the quick brown"
    wanted = {f"task/{name}": expected(place, name, prompt, 12) for name in METHODS}
    wanted["tiny"] = expected(place, None, prompt, 12)
    wanted["task/alpha@challenger"] = expected(place, "alpha-2", prompt, 12)
    assert len(set(wanted.values())) == len(wanted), "the adapters must differ to be told apart"

    def ask(model: str) -> str:
        return str(client.completions.create(model=model, prompt=prompt, max_tokens=12).choices[0].text)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, [*wanted, *wanted]))
    assert dict(zip(wanted, found, strict=False)) == wanted
    assert found[: len(wanted)] == found[len(wanted) :]


def test_streams_carry_the_same_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="task/gamma", prompt="abc", max_tokens=20)
    chunks = list(
        client.completions.create(
            model="task/gamma", prompt="abc", max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    messages: Any = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
    pieces = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == chat.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"


def test_a_chat_with_a_task_adapter_is_asked_as_in_training(client: openai.OpenAI, place: Path) -> None:
    prompt = TEMPLATE.replace("{labels}", "no, not at all or yes").replace("{text}", "is it?")
    found = client.chat.completions.create(
        model="task/alpha", messages=[{"role": "user", "content": "is it?"}], max_tokens=8
    )
    assert found.choices[0].message.content == expected(place, "alpha", prompt, 8).removeprefix(" ")
    assert found.usage is not None and found.usage.prompt_tokens == len(prompt)


def test_stops_seeds_choices_and_log_probabilities(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="abc", max_tokens=24).choices[0].text
    stop = free[6:8]
    ended = client.completions.create(model="tiny", prompt="abc", max_tokens=24, stop=[stop, "never there"]).choices[0]
    assert (ended.text, ended.finish_reason) == (free[: free.index(stop)], "stop")

    def drawn(seed: int) -> list[str]:
        found = client.completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=1.0, n=3, seed=seed)
        return [choice.text for choice in found.choices]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 1
    logs = client.completions.create(model="tiny", prompt="abc", max_tokens=4, logprobs=3).choices[0].logprobs
    assert logs is not None and logs.top_logprobs is not None and logs.token_logprobs is not None
    assert [len(top) for top in logs.top_logprobs] == [3] * 4
    assert [max(top.values()) for top in logs.top_logprobs] == pytest.approx(logs.token_logprobs)  # it is greedy
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and [len(token.top_logprobs) for token in content] == [2, 2, 2]


def test_classification_gives_the_likelihood_of_every_label(server: Server, place: Path) -> None:
    texts = ["one", "two words", "three of them here"]
    with server.client() as http:
        found = http.post("/v1/classify", json={"model": "task/alpha", "input": texts}).json()["data"]
    backbone = backbones.load(str(place / "tiny"))
    model = adapters.with_adapter(backbone.model, adapters.load(place / "made" / "alpha", backbone.model))
    for text, answer in zip(texts, found, strict=True):
        prompt = TEMPLATE.replace("{labels}", "no, not at all or yes").replace("{text}", text)
        odds = []
        for label, deciding in zip(LABELS, (4, 4, 2), strict=True):  # " no" goes on with the end, " not" with "t"
            ids = [*backbone.tokenizer.encode(prompt + " " + label), backbone.tokenizer.eos_token_id]
            logits = model(mx.array([ids]))[0]
            logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            first = len(prompt)
            odds.append(sum(float(logs[first - 1 + d, ids[first + d]]) for d in range(deciding)))
        weights = mx.softmax(mx.array(odds)).tolist()
        assert answer["probs"] == pytest.approx(weights, abs=2e-3)
        assert answer["label"] == LABELS[weights.index(max(weights))]
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "../../etc/passwd", "prompt": "x"}, 404, "no model"),
        ({"model": "task/alpha@9", "prompt": "x"}, 404, "no version"),
        ({"model": "tiny", "prompt": "x", "max_tokens": 100000}, 400, "context"),
        ({"model": "tiny", "prompt": "x" * 600}, 400, "context"),
        ({"model": "tiny", "prompt": [999999]}, 400, "token ids"),
        ({"model": "tiny", "prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"model": "tiny", "prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"model": "tiny", "prompt": "x", "presence_penalty": 1}, 400, "presence_penalty"),
        ({"model": "tiny"}, 400, "prompt"),
        ({"model": "tiny", "prompt": []}, 400, "prompt"),
        ({"model": "tiny", "prompt": "x", "stop": ["", "a"]}, 400, "stop"),
    ],
)
def test_wrong_input_is_said_in_one_sentence(server: Server, body: dict[str, Any], status: int, words: str) -> None:
    with server.client() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["tiny", "task/alpha", "task/alpha@1", "task/@", "@", ""]) | st.text(max_size=8),
        "prompt": st.text(max_size=12) | st.lists(st.integers(-1, 300), max_size=4) | st.lists(st.text(max_size=3)),
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "system", "tool", ""]), "content": st.text(max_size=9)}
            ),
            max_size=3,
        ),
        "input": st.text(max_size=9) | st.lists(st.text(max_size=4), max_size=3),
        "labels": st.lists(st.text(max_size=3), max_size=3),
        "template": st.sampled_from(["{text}", "{text", "{x}", ""]),
        "max_tokens": st.integers(-1, 5),
        "temperature": st.floats(-1, 3, allow_nan=False),
        "top_p": st.floats(0, 1),
        "n": st.integers(0, 3),
        "seed": st.integers(-1, 2**64),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
        "stream": st.booleans(),
        "logprobs": st.booleans() | st.integers(-1, 6),
        "top_logprobs": st.integers(-1, 3),
        "rows": st.lists(st.dictionaries(st.sampled_from(["text", "labels"]), st.text(max_size=3)), max_size=2),
        "task": st.text(max_size=5),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["chat/completions", "completions", "classify", "select"]), FIELDS)
def test_no_input_makes_the_server_fail(server: Server, route: str, body: dict[str, Any]) -> None:
    with server.client() as http:
        answer = http.post(f"/v1/{route}", json={"max_tokens": 3, **body})
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def test_a_text_of_which_the_template_leaves_nothing_is_refused(server: Server) -> None:
    with server.client() as http:
        answer = http.post("/v1/classify", json={"model": "task/alpha", "input": ["ok", ""], "template": "{text}"})
    assert answer.status_code == 400 and "input 1" in answer.json()["error"]["message"]


def test_bodies_are_bounded_and_other_names_refused(server: Server) -> None:
    with server.client() as http:
        assert http.post("/v1/select", content=b'{"rows": ["' + b"x" * (17 * 2**20)).status_code == 413
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        kind = {"Content-Type": "application/json"}
        assert http.post("/v1/completions", content=b"{", headers=kind).status_code == 400
        assert http.get("/no/such/route").status_code == 404
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:  # chunked, and never announced
        raw.sendall(b"POST /v1/select HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(20):
                raw.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
        except OSError:
            pass
        else:
            assert b" 413 " in raw.recv(4096).split(b"\r\n")[0] + b" "


def test_heads_are_bounded(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(OSError):  # long before all of it is here, it hangs up
            for _ in range(500):
                raw.sendall(b"X-A: " + b"a" * 100_000 + b"\r\n")


@contextlib.contextmanager
def listening(app: Any) -> Iterator[int]:
    """An application of our own behind the server's own connections; the port."""
    running = uvicorn.Server(configured(app))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(30)


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await asyncio.sleep(float(scope["path"][1:]))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


def test_connections_that_ask_nothing_are_closed_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "HEAD_SECONDS", 0.5)
    head = b" HTTP/1.1\r\nHost: x\r\n\r\n"
    with listening(slow_app) as port, contextlib.ExitStack() as stack:
        silent, dripping, asking = (
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(3)
        )
        asking.sendall(b"GET /1" + head)  # takes twice as long as heads may
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 9:  # a byte now and then is no reason to wait longer
                dripping.sendall(b"G")
                time.sleep(0.1)
        assert 0.4 < time.monotonic() - begin < 8
        assert silent.recv(1) == b""
        assert asking.recv(1000).startswith(b"HTTP/1.1 204")
        asking.sendall(b"GET /0" + head)
        assert asking.recv(1000).startswith(b"HTTP/1.1 204"), "it may ask again"
        assert asking.recv(1) == b""


def test_connections_are_fewer_than_files_that_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "HEAD_SECONDS", 1.0)
    assert configured(slow_app).limit_concurrency <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4
    monkeypatch.setattr(serving_module, "CONNECTIONS", 6)
    with listening(slow_app) as port, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(20)]
        for connection in silent[7:]:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b"", "closed at once"
        silent[0].setblocking(False)
        with pytest.raises(BlockingIOError):  # while this one may still ask
            silent[0].recv(1)
        until = time.monotonic() + 10
        while not answers(port):
            assert time.monotonic() < until, "they were hung up on, and it answers again"
            time.sleep(0.1)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/0", trust_env=False).status_code == 204
    except httpx.HTTPError:
        return False


def test_operation_routes_and_logs_without_text(server: Server, client: openai.OpenAI) -> None:
    secret = "a very secret sentence"
    client.completions.create(model="task/beta", prompt=secret, max_tokens=3)
    with server.client() as http:
        http.get(f"/v1/models/{secret}")
        http.get("/" + secret.replace(" ", "-"))
        assert http.get("/healthz").json() == {"status": "ok"}
        text = http.get("/metrics").text
        api = http.get("/openapi.json").json()
        assert "/openapi.json" in http.get("/docs").text
    assert 'metapeft_http_requests_total{route="/v1/completions",status="200"}' in text
    assert "metapeft_engine_mixed_steps_total" in text
    assert "/v1/classify" in api["paths"]
    requests = [r for r in server.records() if r["event"] == "request"]
    assert {"prompt_tokens", "written", "model"} <= set(requests[-6]) | set(requests[-7])
    assert "secret" not in server.log.read_text(encoding="utf-8")


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True, "stop": ["never, never"]}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    until = time.monotonic() + 20
    while value(server, "metapeft_engine_rows") > 0:
        assert time.monotonic() < until, "the row is still being written"
        time.sleep(0.1)


def value(server: Server, name: str) -> float:
    with server.client() as http:
        lines = http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


def deployed(server: Server, version: int, seconds: float = 40) -> dict[str, Any]:
    """The first deployment record of a version of alpha, once there is one."""
    until = time.monotonic() + seconds
    with server.client() as http:
        while time.monotonic() < until:
            found = http.get("/v1/deployments").json()["data"]
            for record in found:
                if record["task"] == "alpha" and record["version"] == version and record["alias"] == "champion":
                    return record
            time.sleep(0.2)
    raise AssertionError(f"version {version} was not deployed: {found}")


def test_a_promotion_is_deployed_at_once_and_requests_in_flight_end_as_they_began(
    server: Server, client: openai.OpenAI, place: Path
) -> None:
    name = next(m.name for m in models.list_models(settings_of(place)) if m.task == "alpha")
    old, new = (expected(place, which, "in flight", 300) for which in ("alpha", "alpha-2"))
    assert old != new
    stream = client.completions.create(model="task/alpha", prompt="in flight", max_tokens=300, stream=True)
    text = next(iter(stream)).choices[0].text
    models.promote(settings_of(place), name, 2)
    assert deployed(server, 2)["outcome"] == "deployed"
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == old
    assert client.completions.create(model="task/alpha", prompt="in flight", max_tokens=300).choices[0].text == new
    assert models.rollback(settings_of(place), name).version == 1


def test_a_broken_version_is_refused_and_its_promotion_undone(
    server: Server, client: openai.OpenAI, place: Path
) -> None:
    """One whose numbers overflow, and one whose files were changed after it was registered."""
    served, backbone = settings_of(place), backbones.load(str(place / "tiny"))
    before = client.completions.create(model="task/alpha@1", prompt="abc", max_tokens=9).choices[0].text
    wild = save(place / "made" / "wild", backbone, "lora", 11)
    weights = {key: tensor * 1e30 for key, tensor in load_file(wild / "adapter_model.safetensors").items()}
    save_file(weights, wild / "adapter_model.safetensors")
    folder.publish(wild, {p.name: p.read_bytes() for p in wild.iterdir() if p.name != folder.MANIFEST})
    register(served, wild, "alpha", "lora", score=0.95, seed=11)
    refused = deployed(server, 3)
    assert refused["outcome"] == "refused" and "finite" in refused["reason"]
    assert "champion now: version 1" in refused["reason"]
    assert models.resolve(served, "task/alpha")[1].version == 1

    other = save(place / "made" / "changed", backbone, "lora", 12)
    number = register(served, other, "alpha", "lora", score=0.5, seed=12).model.version
    where, _ = models.resolve(served, f"task/alpha@{number}")
    again = save(place / "made" / "swapped", backbone, "lora", 13)
    folder.publish(where, {p.name: p.read_bytes() for p in again.iterdir() if p.name != folder.MANIFEST})
    models.promote(served, models.resolve(served, "task/alpha")[1].name, number)
    refused = deployed(server, number)
    assert refused["outcome"] == "refused" and "not those that were registered" in refused["reason"]
    assert models.resolve(served, "task/alpha")[1].version == 1
    with pytest.raises(openai.InternalServerError, match="cannot be served now") as failed:
        client.completions.create(model=f"task/alpha@{number}", prompt="abc", max_tokens=9)
    assert failed.value.status_code == 503 and failed.value.type == "server_error"
    assert any("not those that were registered" in record.get("error", "") for record in server.records())
    assert client.completions.create(model="task/alpha", prompt="abc", max_tokens=9).choices[0].text == before


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_back_and_a_kill_loses_nothing_but_requests(place: Path) -> None:
    with serving(place, str(place / "tiny"), "--rows", "2", "--queue", "3", "--adapter-mb", "0.02") as running:
        body = {"model": "task/alpha", "prompt": "x", "max_tokens": 200, "stop": ["never, never"]}

        def ask(n: int) -> httpx.Response:
            with running.client() as http:
                return http.post("/v1/completions", json=body | {"model": f"task/{list(METHODS)[n % 4]}"})

        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(ask, range(24)))
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "server_busy"
        assert value(running, "metapeft_engine_evictions_total") > 0  # and still every answer was right:
        good = {n % 4: answer for n, answer in enumerate(answers) if answer.status_code == 200}
        texts = {n: answer.json()["choices"][0]["text"] for n, answer in good.items()}
        for n, text in texts.items():
            assert text == expected(place, list(METHODS)[n], "x", 200)
        running.end(signal.SIGKILL)
    assert list((place / "servers").glob("*.json")), "the killed server left its note"
    with serving(place, str(place / "tiny")) as running, running.client() as http:
        again = http.post("/v1/completions", json={"model": "task/alpha", "prompt": "x", "max_tokens": 200})
        assert again.json()["choices"][0]["text"] == texts.get(0, expected(place, "alpha", "x", 200))

        # An orderly end: what was accepted is finished, nothing new is accepted, the note is gone.
        done: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: done.append(ask_long(running)))
        thread.start()
        time.sleep(0.5)
        assert running.end(signal.SIGTERM) == 0
        thread.join()
        assert done[0].status_code == 200
        assert done[0].json()["choices"][0]["text"] == expected(place, None, "abc", 400)
    assert not list((place / "servers").glob(f"*-{running.process.pid}.json"))


def ask_long(server: Server) -> httpx.Response:
    with server.client() as http:
        return http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 400})


def test_nothing_listens_for_others_without_a_key(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from metapeft.cli import main

    assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--backbone", str(place / "tiny")]) == 2
    assert "metapeft keys create" in capfd.readouterr().err


def test_how_often_the_registry_is_looked_at_is_bounded(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from metapeft.cli import main

    assert main(["serve", "--poll-seconds", "inf", "--port", "0", "--backbone", str(place / "tiny")]) == 2
    assert "--poll-seconds" in capfd.readouterr().err


def test_json_answers_hold_no_nan(server: Server) -> None:
    with server.client() as http:
        for path in ("/v1/overview", "/v1/models", "/v1/deployments"):
            json.loads(http.get(path).text, parse_constant=lambda name, path=path: pytest.fail(f"{path}: {name}"))
