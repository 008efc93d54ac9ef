"""The page in real headless Chromium, selection over HTTP, and keys, on one server with a small random backbone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metapeft import backbones
from metapeft.serving import keys
from metapeft.settings import load_settings
from tests.backbones.tiny import tiny_folder
from tests.serving.made import Server, register_all, save, serving
from tests.stages.made import spam_rows

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
ROWS = spam_rows(60)
OVERVIEW_ROUTES = ("/v1/models", "/v1/overview", "/v1/deployments", "/metrics")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("page")
    shutil.copytree(tiny_folder("llama"), home / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(home))
        settings = load_settings(backbone=str(home / "tiny"))
        folder = save(home / "made", backbones.load(settings.backbone), "lora")
        register_all(settings, [(folder, "alpha", "lora", 0.9, 0)])
        yield home


@pytest.fixture(autouse=True)
def same_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_HOME", str(place))


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    with serving(place, str(place / "tiny")) as running:
        yield running


def test_selection_gives_the_answer_of_the_command_line(server: Server, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "spam.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    with server.client() as http:
        first = http.post("/v1/select", json={"rows": ROWS, "name": "spam", "prefer": "speed"})
        assert first.status_code == 202 and first.headers["Location"] == f"/v1/select/{first.json()['id']}"
        again = http.post("/v1/select", json={"rows": ROWS, "name": "spam", "prefer": "speed"})
        assert again.json()["id"] == first.json()["id"], "equal requests are one measurement"
        assert http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2}).status_code == 200
        answer = first
        until = time.monotonic() + 250
        while answer.status_code == 202 and time.monotonic() < until:
            time.sleep(0.2)
            answer = http.get(first.headers["Location"])
        assert answer.status_code == 200, answer.text
        found = answer.json()["recommendation"]
        begin = time.perf_counter()
        warm = http.post("/v1/select", json={"rows": ROWS, "name": "spam", "prefer": "speed"})
        assert warm.status_code == 200 and warm.json()["recommendation"] == found
        assert time.perf_counter() - begin < 1
        other = http.post("/v1/select", json={"rows": ROWS, "name": "spam", "prefer": "accuracy"})
        assert other.status_code == 200, "the task is measured: another preference needs no second measurement"
    for prefer, given in (("speed", found), ("accuracy", other.json()["recommendation"])):
        command = [sys.executable, "-m", "metapeft.cli", "recommend", str(file), "--json", "--prefer", prefer]
        command += ["--backbone", str(place / "tiny")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
        assert steady(json.loads(done.stdout)) == steady(given)


def steady(found: dict[str, Any]) -> Any:
    """Without what belongs to the single decision: its id and time."""
    return {key: value for key, value in found.items() if key in ("task", "basis", "recommendations", "neighbours")}


def test_what_no_recommendation_can_be_made_of_is_said(server: Server) -> None:
    with server.client() as http:
        for body, words in (
            ({"task": "/etc/passwd"}, "task"),
            ({"task": "sms_spam", "rows": ROWS}, "either task or rows"),
            ({}, "either task or rows"),
            ({"rows": [{"text": "a"}]}, "label"),
            ({"rows": ROWS, "name": "../up"}, "name"),
            ({"rows": ROWS, "prefer": "beauty"}, "prefer"),
        ):
            answer = http.post("/v1/select", json=body)
            assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
        assert http.get("/v1/select/" + "0" * 24).status_code == 404


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine; Debian: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, server: Server, width: int) -> tuple[Any, list[str], list[str]]:
    """The page, what it asked for, and what went wrong in it."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.wait_for_selector("#models table")
    return page, asked, wrong


def test_the_page_ranks_methods_for_a_small_dataset(browser: Any, server: Server) -> None:
    page, asked, wrong = opened(browser, server, 1200)
    assert "alpha" in page.inner_text("#models") and "champion" in page.inner_text("#models")
    page.fill("#rows", "".join(json.dumps(row) + "\n" for row in ROWS))
    page.fill("#name", "spam")
    page.select_option("#prefer", "speed")
    page.click("#send")
    page.wait_for_selector("#answer table", timeout=120_000)
    with server.client() as http:
        found = http.post("/v1/select", json={"rows": ROWS, "name": "spam", "prefer": "speed"}).json()["recommendation"]
    shown = [row.inner_text() for row in page.query_selector_all("#answer tbody tr")]
    assert len(shown) == len(found["recommendations"])
    for text, entry in zip(shown, found["recommendations"], strict=True):
        assert entry["method"] in text and f"{entry['score']['low']:.3f}" in text
    page.locator("#decisions", has_text="spam").wait_for()
    page.wait_for_selector("#map circle")
    assert all(url.startswith(server.url + "/") for url in asked), "an external asset"
    assert wrong == []
    page.click("text=interface")
    page.get_by_text("/v1/chat/completions").wait_for()
    page.close()


def test_a_mistake_is_shown_and_markup_in_data_stays_text(browser: Any, server: Server) -> None:
    from playwright.sync_api import expect

    page, _, _ = opened(browser, server, 1200)
    page.fill("#rows", '{"text": "<img src=x onerror=alert(1)>"}')
    page.click("#send")
    page.wait_for_selector("#progress.error")
    assert "label" in page.inner_text("#progress") and page.query_selector("#progress img") is None
    before = page.inner_text("#progress")
    page.fill("#rows", "not json, nor,\nany table")
    page.click("#send")
    expect(page.locator("#progress.error")).not_to_have_text(before)
    page.close()


def test_a_phone_can_read_it(browser: Any, server: Server) -> None:
    page, _, _ = opened(browser, server, 375)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.close()


def test_with_keys_nobody_gets_in_without_one_and_each_has_its_rate(
    server: Server, request: pytest.FixtureRequest
) -> None:
    """Last: from here on the server has keys."""
    _, user = keys.create("user", per_minute=20)
    _, admin = keys.create("admin", admin=True)
    try:
        with server.client() as http:
            for route in OVERVIEW_ROUTES:
                assert http.get(route).status_code == 401
                assert http.get(route, headers={"Authorization": "Bearer mp-wrong"}).status_code == 401
                assert http.get(route, headers={"Authorization": f"Bearer {admin}"}).status_code == 200
            assert (
                http.get("/healthz").status_code == http.get("/readyz").status_code == http.get("/").status_code == 200
            )
            own = {"Authorization": f"Bearer {user}"}
            assert http.post("/v1/deploy", json={}, headers=own).status_code == 403
            assert http.post("/v1/deploy", json={}, headers={"Authorization": f"Bearer {admin}"}).status_code == 202
            codes = [http.get("/v1/models", headers=own).status_code for _ in range(30)]
            assert codes.count(200) >= 19 and codes[-1] == 429
            assert "Retry-After" in http.get("/v1/models", headers=own).headers
            keys.revoke("user")
            assert http.get("/v1/models", headers=own).status_code == 401
        if CHROMIUM:
            page = request.getfixturevalue("browser").new_page()
            page.goto(server.url)
            page.wait_for_selector("#login:not([hidden])")
            page.fill("#key", admin)
            page.click("text=Use it")
            page.wait_for_selector("#models table")
            page.close()
        text = server.log.read_text(encoding="utf-8")
        assert user not in text and admin not in text
    finally:
        for key in keys.load():
            keys.revoke(key.name)
