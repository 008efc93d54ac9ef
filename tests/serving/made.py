"""A registry with small adapters, and a real server on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from metapeft.backbones import Backbone
from metapeft.data.task import Example, Task
from metapeft.peft import adapters, create, parse
from metapeft.runtime import mx, tree_map
from metapeft.settings import Settings
from metapeft.training.trial import Score, Trial, trial_id

SMALL = {
    "lora": {"rank": 2},
    "adalora": {"initial_rank": 3, "target_rank": 2},
    "prompt": {"tokens": 5},
    "prefix": {"tokens": 3},
    "p_tuning": {"tokens": 4, "width": 16},
}
LABELS = ("no", "not at all", "yes")  # two share their beginning
TEMPLATE = "Answer {labels}\n{text}\nAnswer:"


def save(
    folder: Path, backbone: Backbone, method: str, seed: int = 0, scale: float = 0.3, labels: tuple[str, ...] = LABELS
) -> Path:
    """An adapter with random weights that matter, as training saves it."""
    config = parse(method, SMALL[method])
    adapter = create(config, backbone.model, seed=seed, text_ids=list(range(40, 72)))
    adapter.attach(backbone.model)
    mx.random.seed(seed + 1)
    moved = tree_map(lambda v: v + scale * mx.random.normal(v.shape), adapter.module.trainable_parameters())
    adapter.module.update(moved)
    form = {"name": "t", "kind": "classification", "labels": list(labels), "template": TEMPLATE}
    adapters.save(adapter, folder, {"backbone": backbone.id, "task": form})
    adapter.detach(backbone.model)
    return folder


def task(name: str) -> Task:
    rows = tuple(Example(f"Answer: {n}", f" {LABELS[n % 3]}") for n in range(12))
    return Task(name, "0123456789abcdef", "classification", "accuracy", rows[:8], rows[8:10], rows[10:], LABELS)


def register(settings: Settings, folder: Path, name: str, method: str, score: float = 0.9, seed: int = 0) -> Any:
    """Put an adapter folder into the real registry."""
    return register_all(settings, [(folder, name, method, score, seed)])[0]


def register_all(settings: Settings, adapters: list[tuple[Path, str, str, float, int]]) -> list[Any]:
    """Several of them (folder, task, method, score, seed) in one run."""
    from metapeft import tracking

    with tracking.run(settings, "train") as tracker:
        return [
            tracker.register(folder, trial(settings.backbone, name, method, score, seed), task(name))
            for folder, name, method, score, seed in adapters
        ]


def trial(backbone: str, name: str, method: str, score: float, seed: int) -> Trial:
    configuration = {"method": method, "learning_rate": 1e-3, "seed": seed, **SMALL[method]}
    return Trial(
        id=trial_id(name, "0123456789abcdef", backbone, configuration, seed, 10, 8),
        task=name,
        task_version="0123456789abcdef",
        backbone=backbone,
        method=method,
        configuration=configuration,
        seed=seed,
        budget=10,
        status="ok",
        score=Score("accuracy", score, 0.02, 300, 0.3),
        untuned_score=Score("accuracy", 0.4, 0.02, 300, 2.0),
    )


@dataclass
class Server:
    """A running `metapeft serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, headers=self.headers, trust_env=False, **options)

    def records(self) -> list[dict[str, Any]]:
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def end(self, how: signal.Signals = signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(how)
        return self.process.wait(seconds)


@contextmanager
def serving(home: Path, backbone: str, *arguments: str, **environment: str) -> Iterator[Server]:
    """Starts the command on a free port and waits until it is ready."""
    log = home / "server.log"
    variables = {**os.environ, "METAPEFT_HOME": str(home), "OPENBLAS_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "metapeft.cli", "serve", "--port", "0", "--backbone", backbone, *arguments]
    before = log.stat().st_size if log.exists() else 0
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=variables)
    try:
        url = ""
        until = time.monotonic() + 300  # on a machine that others use, imports alone take minutes
        while time.monotonic() < until and process.poll() is None:
            said = log.read_text(encoding="utf-8")[before:]
            found = [line.rsplit(" ", 1)[-1] for line in said.splitlines() if line.startswith("serving ")]
            url = url or (found[0] if found else "")
            if url and _ready(url):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"the server did not start:\n{log.read_text(encoding='utf-8')[before:][-3000:]}")
        yield Server(process, url, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
