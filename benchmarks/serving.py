"""How fast is serving? `metapeft serve` beside `mlx_lm.server`, on the same float32 weights, adapters and requests.

    python benchmarks/serving.py [--quick] [--json FILE] [--seconds S] [--soak S]

Both servers run; they are asked in turns, so that whatever else the machine does disturbs both alike. mlx_lm.server
gets the weights as metapeft computes with them (float32, the fast BLAS that metapeft opens) and the same eight LoRA
adapters (rank 8, every linear layer) in its own format. Clients are closed loops: each sends its next request when the
last one is answered; nothing is streamed, every answer is 32 tokens at most, and only tokens that arrived count.

    one        all requests use one adapter
    mixed      requests take turns through eight adapters

Then: 64 clients for five minutes on metapeft alone (errors, memory), and /v1/select at 20 requests a second on a task
that was measured before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = "smollm2-135m-instruct"
ADAPTERS, TOKENS, TARGET_RATE = 8, 32, 20
CLIENTS = (1, 8, 64)
TOPICS = ("the sea", "an old clock", "two friends", "a lost dog", "the first snow", "a small shop", "my garden", "rain")
STOCK = "import metapeft.runtime; from mlx_lm.server import main; main()"  # the same BLAS


@dataclass
class Contender:
    """A running server, and how to ask it for an adapter. `model(n)`: what makes a request use adapter n."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    bodies: list[dict[str, Any]]


@dataclass
class Load:
    """What one closed loop of clients measured."""

    seconds: float = 0.0
    tokens: int = 0
    errors: int = 0
    latencies: list[float] = field(default_factory=list)

    def row(self, contender: str, adapters: str, clients: int) -> dict[str, Any]:
        times = sorted(self.latencies)
        return {
            "server": contender,
            "adapters": adapters,
            "clients": clients,
            "requests": len(times),
            "errors": self.errors,
            "requests_per_second": round(len(times) / self.seconds, 2),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "p50_seconds": percentile(times, 0.5),
            "p99_seconds": percentile(times, 0.99),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seconds each, a short soak, 64 clients on ours only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, help="of every measurement, until no new request starts")
    parser.add_argument("--soak", type=float, help="seconds with 64 clients (default: 300; quick: 20)")
    parser.add_argument("--rounds", type=int, help="turns of each server (default: 3; quick: 1)")
    parser.add_argument("--clients", default=",".join(map(str, CLIENTS)), help="how many at the same time; '': no race")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare)
        return 0
    seconds = options.seconds or (6 if options.quick else 20)
    soak = (20.0 if options.quick else 300.0) if options.soak is None else options.soak
    rounds = options.rounds or (1 if options.quick else 3)

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["METAPEFT_HOME"] = str(prepare_home(work))
        subprocess.run([sys.executable, __file__, "--prepare", str(work)], check=True)
        facts = json.loads((work / "made.json").read_text(encoding="utf-8"))
        clients = [int(count) for count in options.clients.split(",") if count]
        with ours(facts) as metapeft:
            rows = []
            if clients:
                with theirs(facts, work) as stock:
                    rows = side_by_side([metapeft, stock], clients, seconds, rounds, options.quick)
            soaked = soaking(metapeft, soak)
            print(table([soaked]), flush=True)
            selected = selecting(metapeft, 10 if options.quick else 30)
            print(table([selected]), flush=True)
    targets = judged(rows, soaked, selected)
    for target in targets:
        verdict = "met    " if target["met"] else "NOT met"
        print(f"{verdict} {target['name']}: {target['value']} (target {target['target']})")
    if options.json:
        record = {
            "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "rows": rows,
            "soak": soaked,
            "select": selected,
            "targets": targets,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def prepare_home(work: Path) -> Path:
    """A METAPEFT_HOME of its own; only the converted backbone is shared with the user's."""
    from metapeft.settings import home

    shared = home() / "backbones"
    shared.mkdir(parents=True, exist_ok=True)
    (work / "home").mkdir()
    (work / "home" / "backbones").symlink_to(shared)
    return work / "home"


def prepare(work: Path) -> None:
    """In a process of its own: adapters in the registry and in mlx-lm's format, the backbone in float32."""
    import shutil

    from metapeft import backbones, tracking
    from metapeft.data.task import Example, Task
    from metapeft.peft import adapters, checkpoints, create, parse
    from metapeft.runtime import mx, tree_flatten
    from metapeft.settings import load_settings
    from metapeft.training.trial import Score, Trial, trial_id

    settings = load_settings(backbone=BACKBONE)
    backbone = backbones.load(BACKBONE)
    plain = work / "float32"
    plain.mkdir()
    for file in backbone.path.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "manifest.json":
            shutil.copy(file, plain)
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = dict(tree_flatten(backbone.model.parameters()))
    mx.save_safetensors(str(plain / "model.safetensors"), weights, {"format": "mlx"})

    facts: dict[str, Any] = {"plain": str(plain), "models": [], "adapters": []}
    with tracking.run(settings, "benchmark") as tracker:
        for number in range(ADAPTERS):
            config_ = parse("lora", {"rank": 8})
            adapter = create(config_, backbone.model, seed=number)
            for delta in adapter.deltas.values():  # type: ignore[attr-defined]
                delta.b = 0.002 * mx.random.normal(delta.b.shape, key=mx.random.key(number))
            folder = work / "made" / str(number)
            adapters.save(adapter, folder, {"backbone": BACKBONE})
            checkpoints.convert(folder, work / "stock" / str(number), "mlx-lm", str(plain))
            rows = (Example("a", " b"),) * 2
            task = Task(f"bench{number}", f"{number:016d}", "generation", "exact_match", rows, rows, rows)
            configuration = {"method": "lora", "rank": 8, "learning_rate": 1e-3}
            trial = Trial(
                id=trial_id(task.name, task.version, BACKBONE, configuration, 0, 1, 2),
                task=task.name,
                task_version=task.version,
                backbone=BACKBONE,
                method="lora",
                configuration=configuration,
                seed=0,
                budget=1,
                status="ok",
                score=Score("exact_match", 0.5, 0.1, 2, 1.0),
            )
            tracker.register(folder, trial, task)
            facts["models"].append(f"task/{task.name}")
            facts["adapters"].append(str(work / "stock" / str(number)))
    (work / "made.json").write_text(json.dumps(facts), encoding="utf-8")


@contextmanager
def ours(facts: dict[str, Any]) -> Iterator[Contender]:
    port = free_port()
    command = [sys.executable, "-m", "metapeft.cli", "serve", "--port", str(port), "--timeout", "600"]
    with running(command, f"http://127.0.0.1:{port}", "/readyz") as process:
        bodies = [{"model": model} for model in facts["models"]]
        yield Contender("metapeft", f"http://127.0.0.1:{port}", process, bodies)


@contextmanager
def theirs(facts: dict[str, Any], work: Path) -> Iterator[Contender]:
    port = free_port()
    command = [sys.executable, "-c", STOCK, "--model", facts["plain"], "--port", str(port), "--log-level", "ERROR"]
    with running(command, f"http://127.0.0.1:{port}", "/health") as process:
        bodies = [{"model": facts["plain"], "adapters": adapter} for adapter in facts["adapters"]]
        yield Contender("mlx_lm.server", f"http://127.0.0.1:{port}", process, bodies)


@contextmanager
def running(command: list[str], url: str, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 180
        while not answers(url + ready):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"did not start: {' '.join(command[:4])}")
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def side_by_side(
    contenders: list[Contender], counts: list[int], seconds: float, rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """Every contender in turns under every load; the rounds of one load are added up."""
    for contender in contenders:  # libraries warm up
        load(contender, 1, contender.bodies[:1], 1.0)
    rows: list[dict[str, Any]] = []
    for clients in counts:
        for kind, count in (("one", 1), ("mixed", ADAPTERS)):
            total = {contender.name: Load() for contender in contenders}
            for _ in range(rounds):
                for contender in contenders:
                    # mlx_lm.server, reloading for every request, takes minutes for one turn with 64 clients.
                    if quick and clients == 64 and contender.name != "metapeft":
                        continue
                    found = load(contender, clients, contender.bodies[:count], seconds)
                    sum_ = total[contender.name]
                    sum_.seconds += found.seconds
                    sum_.tokens += found.tokens
                    sum_.errors += found.errors
                    sum_.latencies += found.latencies
            new = [found.row(name, kind, clients) for name, found in total.items() if found.latencies]
            print(table(new), flush=True)
            rows += new
    return rows


def load(contender: Contender, clients: int, bodies: list[dict[str, Any]], seconds: float) -> Load:
    """A closed loop: new requests start for `seconds`, and all that started are waited for."""
    return asyncio.run(_load(contender, clients, bodies, seconds))


async def _load(contender: Contender, clients: int, bodies: list[dict[str, Any]], seconds: float) -> Load:
    found = Load()
    begin = time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=contender.url, timeout=1200, limits=limits, trust_env=False) as http:

        async def client(number: int) -> None:
            turn = number
            while time.perf_counter() - begin < seconds:
                prompt = (
                    f"Write a short story about {TOPICS[turn % len(TOPICS)]} and the number {turn}. Once upon a time"
                )
                body = {**bodies[turn % len(bodies)], "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
                start = time.perf_counter()
                try:
                    answer = await http.post("/v1/completions", json=body)
                    found.tokens += answer.json()["usage"]["completion_tokens"]
                    found.latencies.append(time.perf_counter() - start)
                except (httpx.HTTPError, KeyError, ValueError):
                    found.errors += 1
                turn += clients if clients % len(bodies) else clients + 1  # every client meets every adapter

        await asyncio.gather(*(client(number) for number in range(clients)))
    found.seconds = time.perf_counter() - begin
    return found


def soaking(contender: Contender, seconds: float) -> dict[str, Any]:
    """64 clients, eight adapters: errors, and what the process holds when warm and at the end."""
    load(contender, 64, contender.bodies, seconds / 10)
    before = resident_mb(contender.process.pid)
    found = load(contender, 64, contender.bodies, seconds)
    after = resident_mb(contender.process.pid)
    row = found.row(contender.name, "mixed", 64)
    return row | {"seconds": round(found.seconds), "rss_mb_warm": round(before), "rss_mb_end": round(after)}


def resident_mb(pid: int) -> float:
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True).stdout) / 1024


def selecting(contender: Contender, seconds: float) -> dict[str, Any]:
    """/v1/select at a fixed rate, on uploaded rows that were measured before."""
    import random

    chance = random.Random(0)
    words = [["prize", "win", "free", "cash"], ["lunch", "home", "train", "later"]]
    rows = [
        {"text": " ".join(chance.choices(words[n % 2], k=6)) + f" {n}", "label": "ham" if n % 2 else "spam"}
        for n in range(120)
    ]
    bodies = [{"rows": rows, "name": "bench", "prefer": p} for p in ("balanced", "accuracy", "speed", "memory")]
    with httpx.Client(base_url=contender.url, timeout=60, trust_env=False) as http:
        begin = time.perf_counter()
        for body in bodies:
            while (answer := http.post("/v1/select", json={**body, "wait": 30})).status_code == 202:
                pass
            answer.raise_for_status()
        cold = time.perf_counter() - begin
    times = asyncio.run(_at_rate(contender.url, bodies, seconds))
    good = sorted(t for t in times if t is not None)
    return {
        "server": contender.name,
        "rate": TARGET_RATE,
        "requests": len(times),
        "errors": len(times) - len(good),
        "cold_seconds": round(cold, 1),
        "p50_seconds": percentile(good, 0.5),
        "p99_seconds": percentile(good, 0.99),
    }


async def _at_rate(url: str, bodies: list[dict[str, Any]], seconds: float) -> list[float | None]:
    """Open loop: a request starts every 1/TARGET_RATE seconds, whether or not the last was answered."""
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:

        async def ask(number: int) -> float | None:
            begin = time.perf_counter()
            answer = await http.post("/v1/select", json=bodies[number % len(bodies)])
            return time.perf_counter() - begin if answer.status_code == 200 else None

        tasks, begin = [], time.perf_counter()
        for number in range(int(seconds * TARGET_RATE)):
            await asyncio.sleep(max(0.0, begin + number / TARGET_RATE - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(number)))
        return list(await asyncio.gather(*tasks))


def percentile(times: list[float], share: float) -> float | None:
    return round(times[min(len(times) - 1, int(share * len(times)))], 3) if times else None


def judged(rows: list[dict[str, Any]], soaked: dict[str, Any], selected: dict[str, Any]) -> list[dict[str, Any]]:
    rate = {(row["server"], row["adapters"], row["clients"]): row["tokens_per_second"] for row in rows}
    targets = []
    for kind, target in (("one", 1.0), ("mixed", 10.0)):
        for clients in CLIENTS:
            mine, other = rate.get(("metapeft", kind, clients)), rate.get(("mlx_lm.server", kind, clients))
            if mine and other:
                name = f"tokens/s over mlx_lm.server, {kind} adapter(s), {clients} client(s)"
                if kind == "mixed" and clients < ADAPTERS:  # nothing to batch: told, not promised
                    targets.append(
                        {"name": name, "value": round(mine / other, 2), "target": ">= 1", "met": mine >= other}
                    )
                    continue
                value = round(mine / other, 2)
                targets.append({"name": name, "value": value, "target": f">= {target:g}", "met": value >= target})
    growth = soaked["rss_mb_end"] / soaked["rss_mb_warm"]
    errors = soaked["errors"]
    name = f"errors under 64 clients for {soaked['seconds']} s"
    targets.append({"name": name, "value": errors, "target": "0", "met": errors == 0})
    targets.append(
        {"name": "memory at the end over warm", "value": round(growth, 3), "target": "<= 1.1", "met": growth <= 1.1}
    )
    p99 = selected["p99_seconds"]
    fast = p99 is not None and p99 <= 0.5 and not selected["errors"]
    targets.append({"name": "select p99 at 20/s, warm (s)", "value": p99, "target": "<= 0.5", "met": fast})
    return targets


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
