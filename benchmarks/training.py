"""How fast is training? metapeft beside Hugging Face PEFT on PyTorch and mlx-lm's own trainer, on the same steps.

    python benchmarks/training.py --peft-python PATH [--quick] [--json FILE] [--tasks a,b] [--steps N] [--sweep N]

PATH is a Python with benchmarks/requirements-peft.txt installed; without it the comparison with PEFT is left out. Every
contender is a process of its own; they take turns, a few steps each, so that whatever else the machine does disturbs
all alike. All train LoRA r=8 on the same float32 weights and token ids, batch size 8, AdamW:

    metapeft         its trainer; the examples are passed over three times, the frozen trunk is computed once, in time
    peft             transformers' Trainer with its own (random) batches, on PyTorch
    peft-same        the same with metapeft's batches
    mlx-lm           its trainer, with the BLAS that metapeft opens
    mlx-lm-stock     its trainer as installed (on Linux: the reference BLAS)

Rates leave out each contender's first step (libraries warm up), never the trunk. Memory is MLX's peak, and for PyTorch
the largest resident set. The roofline divides the arithmetic of each part by its time. The sweep compares `metapeft
sweep` with as many runs of `metapeft train` (a few of them measured), in wall seconds and in processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = "smollm2-135m-instruct"
TASKS = ("sms_spam", "trec6")
BATCH, RANK, ALPHA, RATE, EPOCHS = 8, 8, 16.0, 5e-4, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RIVALS = ("peft", "peft-same", "mlx-lm", "mlx-lm-stock")
STOCK_STEPS = 2
Step = Callable[[], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one task, few steps, a small sweep")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peft-python", type=Path, help="a Python that has torch, transformers and peft")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--steps", type=int, help="optimizer steps of every contender (default: 48; quick: 9)")
    parser.add_argument("--sweep", type=int, help="trials of the sweep (default: 20; quick: 3; 0: none)")
    parser.add_argument("--only", help="contenders, separated by commas (default: all)")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--separate", type=int, help="runs of `metapeft train` to measure (default: 5; quick: 2)")
    options = parser.parse_args()
    if options.contender:
        return serve(options.contender, json.loads(sys.stdin.readline()))
    tasks = options.tasks.split(",")[: 1 if options.quick else None]
    steps = options.steps or (9 if options.quick else 48)
    sweep = (3 if options.quick else 20) if options.sweep is None else options.sweep
    rivals = [r for r in RIVALS if options.peft_python or not r.startswith("peft")]
    if options.only is not None:
        rivals = [r for r in rivals if r in options.only.split(",")]

    rows: list[dict[str, Any]] = []
    for task in tasks:
        for layers in (0, 10):
            wanted = ["metapeft", *rivals] if layers == 0 else ["metapeft", *(r for r in rivals if r != "mlx-lm-stock")]
            rows += side_by_side(task, layers, steps, wanted, options.peft_python)
            print(table([row for row in rows if (row["task"], row["layers"]) == (task, layers)]), flush=True)
    parts = roofline(tasks[0])
    print(table(parts), flush=True)
    separate = options.separate or (2 if options.quick else 5)
    swept = sweeps(tasks[0], sweep, 10 if options.quick else 20, separate) if sweep else []
    targets = judged(rows, swept)
    for target in targets:
        verdict = "met    " if target["met"] else "NOT met"
        print(f"{verdict} {target['name']}: {target['value']} (target {target['target']})")
    if options.json:
        command = " ".join(["python", "benchmarks/training.py", *sys.argv[1:]])
        record = {"machine": machine(), "command": command, "rows": rows + parts + swept, "targets": targets}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


# Side by side


def side_by_side(
    task: str, layers: int, steps: int, contenders: list[str], peft_python: Path | None
) -> list[dict[str, Any]]:
    """One row per contender: the same LoRA on the same examples for the same number of steps."""
    with tempfile.TemporaryDirectory(prefix="metapeft-benchmark-") as folder:
        spec = prepare(task, layers, steps, Path(folder))
        running = {name: start(name, spec, peft_python) for name in contenders}
        try:
            for process in running.values():
                answer(process)  # it is ready
            done = dict.fromkeys(contenders, 0)
            turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
            while any(done[name] < limit(name, steps) for name in contenders):
                for name, process in running.items():
                    # The first turn is one step: it is left out of the rate.
                    count = min(1 if done[name] == 0 else 4, limit(name, steps) - done[name])
                    if count > 0:
                        print(count, file=process.stdin, flush=True)
                        turns[name].append(answer(process))
                        done[name] += count
            return [row(task, layers, name, turns[name]) for name in contenders]
        finally:
            for process in running.values():
                process.kill()
                process.wait()


def prepare(task_name: str, layers: int, steps: int, folder: Path) -> dict[str, Any]:
    """What every contender gets: weights as a Hugging Face folder, token ids, and metapeft's batches."""
    import shutil

    from metapeft import backbones
    from metapeft.runtime import mx
    from metapeft.training.batches import batch_at
    from metapeft.training.session import Session
    from metapeft.training.vector import leaves

    backbone = backbones.load(BACKBONE)
    task = limited(task_name, steps)
    session = Session(backbone, task)
    weights = {name: value for name, value in leaves(backbone.model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(backbone.path / name, folder / name)
    config = json.loads((backbone.path / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"}))
    examples = [([*session.shared, *e.ids], len(session.shared) + e.start) for e in session.encoded["train"]]
    lengths = [e.length for e in session.encoded["train"]]
    batches = [batch_at(lengths, BATCH, 0, step) for step in range(steps)]
    return {
        "task": task_name,
        "layers": layers,
        "steps": steps,
        "model": str(folder),
        "examples": examples,
        "batches": batches,
    }


def limited(name: str, steps: int) -> Any:
    """The task with as few training examples as make the steps three epochs."""
    from dataclasses import replace

    from metapeft.data.load import load_task

    task = load_task(name)
    return replace(task, train=task.train[: max(BATCH, BATCH * steps // EPOCHS)])


def start(name: str, spec: dict[str, Any], peft_python: Path | None) -> subprocess.Popen[str]:
    python = str(peft_python) if name.startswith("peft") else sys.executable
    environment = os.environ | {"PYTHONPATH": "" if name.startswith("peft") else str(ROOT), "HF_HUB_OFFLINE": "1"}
    log = open(Path(tempfile.gettempdir()) / f"metapeft-benchmark-{name}.log", "w")  # noqa: SIM115
    process = subprocess.Popen(
        [python, __file__, "--contender", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
        cwd=spec["model"],
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(spec) + "\n")
    process.stdin.flush()
    return process


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended early; its log is in {tempfile.gettempdir()}")
    return json.loads(line)


def limit(name: str, steps: int) -> int:
    return min(steps, STOCK_STEPS) if name == "mlx-lm-stock" else steps


def row(task: str, layers: int, name: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    timed = turns[1:] or turns
    trunk = turns[0].get("trunk", 0.0)
    steps = sum(turn["steps"] for turn in timed)
    seconds = sum(turn["seconds"] for turn in timed) + trunk
    return {
        "task": task,
        "layers": layers,
        "contender": name,
        "examples_per_second": round(BATCH * steps / seconds, 2),
        "without_trunk": round(BATCH * steps / (seconds - trunk), 2),
        "seconds": round(seconds, 2),
        "trunk_seconds": round(trunk, 2),
        "cpu_seconds": round(sum(turn["cpu"] for turn in timed), 2),
        "steps": steps,
        "peak_mb": round(turns[-1]["peak_mb"]),
        "resident_mb": round(turns[-1]["resident_mb"]),
        "first_loss": round(turns[0]["loss"], 4),
        "last_loss": round(turns[-1]["loss"], 4),
    }


# Contenders: each yields one step at a time


def serve(name: str, spec: dict[str, Any]) -> int:
    """Reads numbers of steps, answers with what they took. What libraries print goes to stderr."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    makers = {"metapeft": ours, "peft": peft, "peft-same": peft, "mlx-lm": mlx_lm, "mlx-lm-stock": mlx_lm}
    turns = Turns(reply)
    makers[name](name, spec, turns)
    return 0


class Turns:
    """The conversation with the parent: `wait` before each step."""

    def __init__(self, reply: Any):
        self.reply, self.left, self.asked = reply, 0, 0
        self.extra: dict[str, Any] = {}
        self.peak: Callable[[], float] = resident
        self.loss = 0.0

    def say(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self.reply, flush=True)

    def wait(self) -> None:
        """Returns when a step is to be taken; reports when a turn is over."""
        if self.left > 0:
            self.left -= 1
        if self.left == 0:
            if self.asked:
                self.say(
                    steps=self.asked,
                    seconds=time.perf_counter() - self.began,
                    cpu=time.process_time() - self.cpu,
                    peak_mb=self.peak(),
                    resident_mb=resident(),
                    loss=self.loss,
                    **self.extra,
                )
            else:
                self.say(ready=True)
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(0)
            self.left = self.asked = int(line)
            self.began, self.cpu = time.perf_counter(), time.process_time()


def resident() -> float:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**20 if sys.platform == "darwin" else size / 2**10


def ours(name: str, spec: dict[str, Any], turns: Turns) -> None:
    from metapeft import backbones
    from metapeft.peft import create, parse
    from metapeft.runtime import mx
    from metapeft.training.configuration import TrainConfig
    from metapeft.training.session import Session
    from metapeft.training.trainer import _Run
    from metapeft.training.trial import Trial

    session = Session(backbones.load(BACKBONE), limited(spec["task"], spec["steps"]))
    method = parse("lora", {"rank": RANK, "alpha": ALPHA, "layers": spec["layers"]})
    adapter = create(method, session.model, seed=0)
    adapter.attach(session.model)
    trial = Trial("", "", "", "", "lora", {}, 0, spec["steps"], "ok")
    config = TrainConfig(learning_rate=RATE, batch_size=BATCH, schedule="constant")
    run = _Run(session, adapter, config, spec["steps"], 0, None, trial, None)
    turns.peak = lambda: mx.get_peak_memory() / 2**20
    mx.reset_peak_memory()
    turns.wait()
    if run.start > 0:
        begin = time.perf_counter()
        session.trunk("train", run.start).prepare(
            [i for step in range(spec["steps"]) for i in run._batch(step)], session.workers
        )
        turns.extra["trunk"] = time.perf_counter() - begin
        turns.began += turns.extra["trunk"]  # counted once, by itself
    while True:
        turns.loss = run._train_step()
        run.step += 1
        turns.wait()


def peft(name: str, spec: dict[str, Any], turns: Turns) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    depth = model.config.num_hidden_layers
    chosen = list(range(depth - spec["layers"], depth)) if spec["layers"] else None
    model = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, layers_to_transform=chosen, task_type="CAUSAL_LM"),
    )
    rows = [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in spec["examples"]]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(example["input_ids"]) for example in batch)
        padded = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        batch = [example | {"attention_mask": [1] * len(example["input_ids"])} for example in batch]
        return {
            key: torch.tensor([example[key] + [value] * (longest - len(example[key])) for example in batch])
            for key, value in padded.items()
        }

    class Watch(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            turns.wait()

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **named: Any) -> None:
            turns.loss = float(logs.get("loss", turns.loss))

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            turns.wait()

    class Same(Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows, batch_sampler=spec["batches"], collate_fn=collate)

    settings = TrainingArguments(
        output_dir=spec["model"],
        per_device_train_batch_size=BATCH,
        max_steps=spec["steps"] + 1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Same if name == "peft-same" else Trainer
    trainer(model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[Watch()]).train()


def mlx_lm(name: str, spec: dict[str, Any], turns: Turns) -> None:
    if name == "mlx-lm":
        import metapeft.runtime  # noqa: F401 - opens the fast BLAS
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(spec["model"]))
    model.freeze()
    keys = [f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in TARGETS]
    linear_to_lora_layers(
        model,
        spec["layers"] or len(model.layers),
        {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys},
    )
    adapted = sum("lora_a" in path for path, _ in flattened(model.trainable_parameters()))
    assert adapted == len(TARGETS) * (spec["layers"] or len(model.layers)), adapted

    class Watch(TrainingCallback):
        def on_train_loss_report(self, report: dict[str, float]) -> None:
            turns.loss = float(report["train_loss"])
            turns.wait()

    turns.peak = lambda: mx.get_peak_memory() / 2**20
    mx.reset_peak_memory()
    turns.wait()
    train(
        model,
        optim.AdamW(learning_rate=RATE),
        [(ids, start) for ids, start in spec["examples"]],
        args=TrainingArgs(
            batch_size=BATCH, iters=spec["steps"] + 1, steps_per_report=1, steps_per_save=10**9, max_seq_length=4096
        ),
        training_callback=Watch(),
    )


def flattened(tree: Any) -> Any:
    from mlx.utils import tree_flatten

    return tree_flatten(tree)


# Roofline


def roofline(task: str) -> list[dict[str, Any]]:
    """GFLOP/s of the parts of training, beside what matrix products of the same shape reach alone."""
    from metapeft import backbones
    from metapeft.peft import create, parse
    from metapeft.runtime import mx
    from metapeft.training.configuration import TrainConfig
    from metapeft.training.evaluation import predict
    from metapeft.training.session import Session
    from metapeft.training.trainer import _Run
    from metapeft.training.trial import Trial

    session = Session(backbones.load(BACKBONE), limited(task, 30))
    workers = session.workers
    left, right = mx.random.normal((256, 576)), mx.random.normal((576, 1536))
    mx.eval(left, right)

    def products() -> list[mx.array]:
        return [left @ right for _ in range(60)]

    best = min(timed(lambda: workers.map([products] * workers.count)) for _ in range(3))
    peak = workers.count * 60 * 2 * 256 * 576 * 1536 / best / 1e9
    found = [{"part": "matrix products alone, 256 x 576 x 1536", "gflop": None, "seconds": None, "gflops": round(peak)}]

    layer = sum(value.size for _, value in flattened(session.model.layers[0].parameters()))
    head = session.model.model.embed_tokens.weight.size
    depth = session.depth

    def add(part: str, seconds: float, flop: float) -> None:
        rate = flop / seconds / 1e9
        found.append(
            {
                "part": part,
                "gflop": round(flop / 1e9, 1),
                "seconds": round(seconds, 3),
                "gflops": round(rate),
                "of_products": round(rate / peak, 2),
            }
        )

    for layers in (0, 10):
        adapter = create(parse("lora", {"rank": RANK, "layers": layers}), session.model, seed=0)
        adapter.attach(session.model)
        trial = Trial("", "", "", "", "lora", {}, 0, 30, "ok")
        run = _Run(session, adapter, TrainConfig(batch_size=BATCH), 30, 0, None, trial, None)
        wanted = [i for step in range(30) for i in run._batch(step)]
        above = layers or depth
        lora = sum(value.size for _, value in flattened(adapter.module.parameters()))
        tokens = sum(run.lengths[i] for i in run._batch(1)) + workers.count * len(session.shared)
        completion = sum(len(run.examples[i].ids) - run.examples[i].start for i in run._batch(1))
        if run.start > 0:
            own = sum(run.lengths[i] for i in set(wanted))
            seconds = timed(partial(session.trunk("train", run.start).prepare, wanted, workers))
            add(f"trunk of {run.start} layers, once per example", seconds, 2 * run.start * layer * own)
        run.step = 1
        run._train_step()
        seconds = min(timed(run._train_step) for _ in range(4))
        # Forward and the gradient by the input for the frozen weights; all three products for the adapter's.
        add(
            f"training step, top {above} layers",
            seconds,
            4 * above * layer * tokens + 6 * lora * tokens + 4 * head * completion,
        )
        predict(session, adapter, "validation")
        seconds = timed(partial(predict, session, adapter, "validation"))
        examples = session.encoded["validation"]
        tokens = sum(e.length for e in examples) + len(session.shared)
        completion = sum(len(e.ids) - e.start for e in examples)
        add(
            f"evaluation, top {above} layers",
            seconds,
            2 * above * layer * tokens + 2 * lora * tokens + 2 * head * completion,
        )
        adapter.detach(session.model)
    return found


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


# Sweep


def sweeps(task: str, trials: int, steps: int, separate: int) -> list[dict[str, Any]]:
    """`metapeft sweep` beside `metapeft train` of `separate` of its configurations, spread evenly.

    Each side has a new METAPEFT_HOME that shares only the downloads. All trials run to their end (--full-budget). The
    first separate run profiles the task, as the sweep does; the others find that done. So `trials` separate runs are
    counted as the first and the mean of the others for the rest.
    """
    with tempfile.TemporaryDirectory(prefix="metapeft-benchmark-") as folder:
        together, cpu_together, home = command(
            Path(folder, "sweep"), "sweep", task, "--trials", trials, "--steps", steps, "--full-budget"
        )
        [found] = home.glob("work/*/sweep/trials.jsonl")
        tried = [json.loads(line)["configuration"] for line in found.read_text(encoding="utf-8").splitlines()]
        print(f"{len(tried)} trials in a sweep: {together:.0f} s", flush=True)
        apart, cpu_apart = [], []
        for configuration in tried[:: max(1, len(tried) // separate)][:separate]:
            seconds, cpu, _ = command(
                Path(folder, "apart"), "train", task, "--steps", steps, *options_of(configuration)
            )
            apart.append(seconds)
            cpu_apart.append(cpu)
            print(f"{configuration['method']} by itself: {seconds:.0f} s", flush=True)
    whole, cpu_whole = (s[0] + (trials - 1) * sum(s[1:]) / len(s[1:]) for s in (apart, cpu_apart))
    return [
        {
            "task": task,
            "sweep": trials,
            "steps": steps,
            "sweep_seconds": round(together, 1),
            "separate_runs_measured": [round(s, 1) for s in apart],
            "separate_seconds": round(whole, 1),
            "share": round(together / whole, 3),
            "cpu_share": round(cpu_together / cpu_whole, 3),
        }
    ]


def command(home: Path, *arguments: Any) -> tuple[float, float, Path]:
    """Wall and processor seconds of a metapeft command in this METAPEFT_HOME, which is made with links to the
    downloads."""
    from metapeft.settings import home as known

    if not home.exists():
        home.mkdir()
        for name in ("backbones", "data"):
            if (known() / name).exists():
                (home / name).symlink_to((known() / name).resolve())
    environment = os.environ | {"METAPEFT_HOME": str(home), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "metapeft.cli", *map(str, arguments)]
    before = processor_seconds()
    wall = timed(partial(subprocess.run, words, env=environment, cwd=home, check=True, stdout=subprocess.DEVNULL))
    return wall, processor_seconds() - before, home


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def options_of(configuration: dict[str, Any]) -> list[str]:
    """As options of `metapeft train`; defaults are left out."""
    from metapeft.training.configuration import full

    usual = full({"method": configuration["method"]})
    chosen = {key: value for key, value in configuration.items() if usual.get(key) != value}
    return [
        "--method",
        configuration["method"],
        *(w for k, v in chosen.items() for w in ("--set", f"{k}={json.dumps(v)}")),
    ]


# Report


def judged(rows: list[dict[str, Any]], swept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets that these rows can tell something about."""
    by = {(r["task"], r["layers"], r["contender"]): r for r in rows}
    wanted = [
        (0, "peft", 3.0),
        (0, "peft-same", 1.5),
        (0, "mlx-lm", 2.0),
        (0, "mlx-lm-stock", 40.0),
        (10, "peft", 4.0),
        (10, "mlx-lm", 5.0),
    ]
    targets: list[dict[str, Any]] = []
    for task in dict.fromkeys(r["task"] for r in rows):
        for layers, rival, target in wanted:
            if (task, layers, rival) in by:
                mine, theirs = by[task, layers, "metapeft"], by[task, layers, rival]
                value = round(mine["examples_per_second"] / theirs["examples_per_second"], 2)
                name = f"{task}, {'all' if layers == 0 else 'top 10'} layers: examples/s over {rival}'s"
                targets.append({"name": name, "value": value, "target": f">= {target}", "met": value >= target})
        for layers in (0, 10):
            others = [by[task, layers, r]["peak_mb"] for r in ("peft", "mlx-lm") if (task, layers, r) in by]
            if others:
                value = by[task, layers, "metapeft"]["peak_mb"]
                name = f"{task}, {'all' if layers == 0 else 'top 10'} layers: peak memory in MB"
                targets.append(
                    {"name": name, "value": value, "target": f"<= {min(others)}", "met": value <= min(others)}
                )
    for entry in swept:
        name = f"{entry['task']}: a sweep of {entry['sweep']} trials over {entry['sweep']} runs of train"
        targets.append({"name": name, "value": entry["share"], "target": "<= 0.4", "met": entry["share"] <= 0.4})
    return targets


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([("" if row.get(c) is None else str(row[c])) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def machine() -> dict[str, Any]:
    from metapeft.runtime import describe

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return describe() | {"processor": processor(), "load_average": load}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    raise SystemExit(main())
