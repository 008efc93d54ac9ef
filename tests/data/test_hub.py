"""Hugging Face datasets: saved folders with the real library, and what an unreachable hub says."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from metapeft.data import load_task
from metapeft.data.hub import split_tables
from metapeft.data.task import SPLITS
from metapeft.errors import UserError

datasets = pytest.importorskip("datasets")


def features(names: list[str]) -> "datasets.Features":
    return datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})


def data(start: int, stop: int, label: int | None = None) -> "datasets.Dataset":
    rows = {"text": [f"text {i}" for i in range(start, stop)]}
    rows["label"] = [i % 2 if label is None else label for i in range(start, stop)]
    return datasets.Dataset.from_dict(rows, features=features(["negative", "positive"]))


def test_a_saved_dataset_with_splits_and_label_names(tmp_path: Path) -> None:
    saved = datasets.DatasetDict(train=data(0, 60), validation=data(60, 80), test=data(80, 110))
    saved.save_to_disk(tmp_path / "saved")
    task = load_task(tmp_path / "saved")
    assert [len(task.split(name)) for name in SPLITS] == [60, 20, 30]
    assert task.labels == ("negative", "positive")
    assert {re.findall(r"text \d+", str(e.prompt))[0] for e in task.test} == {f"text {i}" for i in range(80, 110)}


def test_withheld_labels_are_not_a_test_split(tmp_path: Path) -> None:
    datasets.DatasetDict(train=data(0, 60), test=data(60, 90, label=-1)).save_to_disk(tmp_path / "saved")
    task = load_task(tmp_path / "saved")
    assert len(task.test) == 18 and len(task.train) + len(task.validation) == 42

    assert task.notes == ("not used: 'test' (no rows, or none with a label)",)


def test_splits_are_known_however_they_are_written(tmp_path: Path) -> None:
    datasets.DatasetDict(Train=data(0, 60), Test=data(60, 90), extra=data(90, 100)).save_to_disk(tmp_path / "saved")
    task = load_task(tmp_path / "saved")
    assert len(task.test) == 30 and task.notes[0] == "not used: 'extra' (only train, validation and test are)"
    with pytest.raises(UserError, match=r"several splits for validation \('validation', 'val'\)"):
        split_tables({"train": data(0, 20), "validation": data(20, 30), "val": data(30, 40)}, "some/dataset")


def test_a_single_table_is_split(tmp_path: Path) -> None:
    data(0, 100).save_to_disk(tmp_path / "saved")
    assert [len(load_task(tmp_path / "saved").split(name)) for name in SPLITS] == [55, 15, 30]


def test_a_broken_folder(tmp_path: Path) -> None:
    data(0, 20).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match="save it again"):
        load_task(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(UserError, match="save it again"):
        load_task(tmp_path / "saved")


def test_splits_that_cannot_be_named() -> None:
    with pytest.raises(UserError, match=r"no split 'train'.*'fold_1', 'fold_2'"):
        split_tables({"fold_1": data(0, 20), "fold_2": data(20, 40)}, "some/dataset")


def test_one_missing_label_is_named() -> None:
    broken = datasets.concatenate_datasets([data(0, 20), data(20, 21, label=-1)])
    with pytest.raises(UserError, match=r"some/dataset \(train\) row 21: column 'label' is missing"):
        split_tables({"train": broken}, "some/dataset")


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of a hub that loading one small dataset asks for."""

    file = "".join(json.dumps({"text": f"text {i}", "label": ["no", "yes"][i % 2]}) + "\n" for i in range(60)).encode()
    commit, blob = "a" * 40, "b" * 40
    api = "/api/datasets/somebody/something"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        listing = [{"type": "file", "oid": self.blob, "size": len(self.file), "path": "train.jsonl"}]
        card = {"license": "cc-by-4.0"}
        info = {
            "id": "somebody/something",
            "sha": self.commit,
            "siblings": [{"rfilename": "train.jsonl"}],
            "cardData": card,
        }
        if path in (self.api, f"{self.api}/revision/{self.commit}"):
            self.answer(200, json.dumps(info).encode())
        elif path == f"{self.api}/tree/{self.commit}":
            self.answer(200, json.dumps(listing).encode())
        elif path.endswith("/train.jsonl"):
            self.answer(200, self.file)
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "ETag": f'"{self.blob}"',
            "X-Repo-Commit": self.commit,
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        if status == 404:
            missing = "EntryNotFound" if "/resolve/" in self.path or "/tree/" in self.path else "RepoNotFound"
            self.send_header("X-Error-Code", missing)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load(endpoint: str, cache: Path, *names: str) -> tuple[list[dict[str, object]], str]:
    """`load_task` of some names in a process of its own (the library reads where the hub is when it is imported), and
    what it wrote to stderr."""
    program = """
import json, sys
from metapeft.data import load_task
from metapeft.errors import MetapeftError
for name in sys.argv[1:]:
    try:
        task = load_task(name)
        print(json.dumps({"labels": task.labels, "rows": [len(task.train), len(task.test)], "licence": task.licence}))
    except MetapeftError as error:
        print(json.dumps({"error": str(error), "exit code": error.exit_code}))
"""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    run = subprocess.run(
        [sys.executable, "-c", program, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return [json.loads(line) for line in run.stdout.splitlines()], run.stderr


def test_a_dataset_of_the_hub_then_from_the_cache(hub: str, tmp_path: Path) -> None:
    (found, missing), _ = load(hub, tmp_path, "somebody/something", "nobody/nothing")
    assert found == {"labels": ["no", "yes"], "rows": [33, 18], "licence": "cc-by-4.0"}
    error = str(missing["error"])
    assert "'nobody/nothing'" in error and "owner/name" in error and "\n" not in error
    assert "cannot be reached" not in error and missing["exit code"] == 2

    (cached, unreachable), stderr = load("http://127.0.0.1:9", tmp_path, "somebody/something", "somebody/else")
    assert cached == {**found, "licence": ""}
    error = str(unreachable["error"])
    assert "'somebody/else'" in error and "cannot be reached" in error and "not in the cache" in error
    assert unreachable["exit code"] == 1
    assert "Retrying" not in stderr  # the library alone asks for 25 seconds
