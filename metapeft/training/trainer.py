"""The trainer: a pure function of (backbone, task, configuration, seed, steps); the same inputs give the same result.

Batches come from `batch_at(seed, step)` and dropout from a key made of (seed, step), so a run that was killed continues
from its last saved state exactly as if nothing had happened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_unflatten

from metapeft.data.task import Task
from metapeft.peft import create
from metapeft.peft.adalora import AdaLoRA
from metapeft.peft.base import Adapter
from metapeft.runtime import MB, device, mx, nn, optim, processor, require_memory, versions
from metapeft.training import native
from metapeft.training.batches import batch_at, shards
from metapeft.training.configuration import TrainConfig, full, split
from metapeft.training.encode import text_ids
from metapeft.training.engine import engine
from metapeft.training.evaluation import Predictions, evaluate, joined, predict, score, untuned
from metapeft.training.noise import GradientNoise
from metapeft.training.session import Session, completion_logits
from metapeft.training.trial import Score, Trial, trial_id
from metapeft.training.vector import Layout, leaves

Progress = Callable[[dict[str, Any]], bool | None]
STATE_SECONDS = 15.0  # how often a resumable state is written
SAMPLE = 64  # validation examples that are scored during training: evaluation costs as much as training
STATE_FORMAT = 2  # of state.safetensors; a state of another format or engine is not continued


class Diverged(Exception):
    """The loss became infinite, not a number, or far larger than at the start."""


def run_trial(
    session: Session,
    configuration: dict[str, Any],
    *,
    steps: int,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
    test: bool = True,
    prepare: Callable[[Adapter], None] | None = None,
    start: str = "",
) -> Trial:
    """Trains one configuration and measures it. What training it does, the status says. Raises Unfit for one that the
    backbone or the rows cannot take.

    folder: where the adapter goes (and, while training, the state that a restarted run continues from); None keeps
    nothing. progress: called with {"step", "steps", "train_loss"} after every step, where there was an evaluation also
    with its row, the whole "curve" and "peak_memory_mb"; returning True stops the trial early (status "stopped", best
    weights so far). test: whether the test split is scored.
    prepare: called with the fresh adapter, attached, before it trains: to start from other weights.
    start: names those weights; another start is another trial.
    """
    configuration = full(configuration)
    method, train = split(configuration)
    task, backbone = session.task, session.backbone
    trial = Trial(
        id=trial_id(
            task.name, task.version, backbone.identity, configuration, seed, steps, len(task.train), start, task.metric
        ),
        task=task.name,
        task_version=task.version,
        backbone=backbone.id,
        method=method.method,
        configuration=configuration,
        seed=seed,
        budget=steps,
        status="ok",
        device=device(),
        versions=versions() | {"processor": processor()},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        train_examples=len(task.train),
    )
    if session.decoder is not None:
        session.decoder.release()
    mx.clear_cache()
    mx.reset_peak_memory()
    begin, cpu = time.perf_counter(), time.process_time()
    adapter: Adapter | None = None
    run: _Run | None = None
    try:
        trial.untuned_score = untuned(session, "test") if test else None
        # The untuned score belongs to the task, not to this trial.
        begin, cpu = time.perf_counter(), time.process_time()
        text = getattr(method, "text", "")
        ids = list(backbone.tokenizer.encode(text)) if text else text_ids(session.shared, session.encoded["train"], 256)
        adapter = create(method, session.model, seed=seed, text_ids=ids)
        trial.trained_parameters = sum(value.size for _, value in leaves(adapter.module.parameters()))
        adapter.attach(session.model)
        if prepare is not None:
            prepare(adapter)
        run = _Run(session, adapter, train, steps, seed, folder, trial, progress)
        run.train()
        trial.validation = run.validated()
        if test:
            trial.score = evaluate(session, adapter, "test")
        if folder is not None:
            _save(adapter, folder, trial, session.task)
    except Diverged as error:
        trial.status, trial.error = "diverged", str(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error).lower():
            raise
        trial.status, trial.error = "out_of_memory", str(error).splitlines()[0]
    finally:
        if adapter is not None:
            adapter.detach(session.model)
        trial.seconds, trial.cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        trial.peak_memory_mb = mx.get_peak_memory() / MB if run is None else run.peak_memory_mb()
        if run is not None:
            trial.seconds += run.earlier_seconds
            trial.cpu_seconds += run.earlier_cpu_seconds
    if folder is not None:
        (folder / "state.safetensors").unlink(missing_ok=True)
    return trial


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        session: Session,
        adapter: Adapter,
        config: TrainConfig,
        steps: int,
        seed: int,
        folder: Path | None,
        trial: Trial,
        progress: Progress | None,
    ):
        self.session, self.adapter, self.config = session, adapter, config
        self.steps, self.seed, self.folder, self.trial, self.progress = steps, seed, folder, trial, progress
        self.examples = session.encoded["train"]
        self.sample = sample(len(session.encoded["validation"]))
        self.lengths = [e.length for e in self.examples]
        self.start = session.start(adapter)
        self.layout = Layout(adapter.module.trainable_parameters())
        self.optimizer = optim.AdamW(
            learning_rate=config.learning_rate, weight_decay=config.weight_decay, bias_correction=True
        )
        self.step = 0
        self.losses: list[float] = []
        self.lowest = math.inf  # mean of five losses in a row
        self.best: Score | None = None
        self.best_vector: mx.array | None = None
        self.best_found: Predictions | None = None  # on the sample, unless an earlier process found them
        self.since_best = 0
        self.noise = GradientNoise()
        self.earlier_seconds = self.earlier_cpu_seconds = self.earlier_peak_mb = 0.0
        self.begin, self.begin_cpu = time.perf_counter(), time.process_time()
        self.saved = self.begin
        if isinstance(adapter, AdaLoRA):
            adapter.schedule(steps)
        self.evaluate_at = evaluated(steps, config.evaluations)
        view = native.usable(session, adapter)
        self.native = None
        if view is not None:
            self.native = native.Loss(session, view, adapter, self.layout, self.start, config.checkpoint)
        self._set(self.layout.join(adapter.module.trainable_parameters()))
        self.optimizer.init({"all": self.vector})

    def train(self) -> None:
        """Runs to the end of the budget, early stopping, or a stop asked for; leaves the best weights in force."""
        self._resume()
        stopped = False
        if self.start > 0:
            wanted = [i for step in range(self.step, self.steps) for i in self._batch(step)]
            self.session.trunk("train", self.start).prepare(wanted, self.session.workers)
        while self.step < self.steps and not stopped:
            require_memory((mx.get_peak_memory() - mx.get_active_memory()) / MB)
            loss = self._train_step()
            self.step += 1
            self.losses.append(loss)
            self._check(loss)
            event: dict[str, Any] = {"step": self.step, "steps": self.steps, "train_loss": loss}
            if self.step in self.evaluate_at:
                event |= self._evaluate()
                event |= {"curve": tuple(self.trial.curve), "peak_memory_mb": self.peak_memory_mb()}
                stopped = 0 < self.config.patience <= self.since_best
            if self.progress is not None and self.progress(event):
                self.trial.status, stopped = "stopped", True
            # Of a stop no state is kept: the run that continued from it would pass the step at which it stopped.
            if self.folder is not None and not stopped and time.perf_counter() - self.saved > STATE_SECONDS:
                self._save_state()
        if self.best is None:
            self._evaluate()
        assert self.best_vector is not None
        self.adapter.before_step(self.steps)  # one that was killed after its last look has not opened it yet
        self._set(self.best_vector)
        self.trial.train_seconds = self._elapsed()

    def validated(self) -> Score:
        """The score of the best weights, which are in force, on the whole validation split."""
        assert self.best is not None
        if self.sample is None:
            return self.best
        rest = sorted(set(range(len(self.session.encoded["validation"]))) - set(self.sample))
        # Apart even where both are unknown: a run that was killed gives the same bits.
        sampled = self.best_found or predict(self.session, self.adapter, "validation", self.sample)
        others = predict(self.session, self.adapter, "validation", rest)
        return score(self.session, joined([sampled, others]), "validation", [*self.sample, *rest])

    def peak_memory_mb(self) -> float:
        """MLX's, MiB, with what came before a kill."""
        return max(self.earlier_peak_mb, mx.get_peak_memory() / MB)

    def _elapsed(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.begin

    def _batch(self, step: int) -> list[int]:
        return batch_at(self.lengths, self.config.batch_size, self.seed, step)

    def _set(self, vector: mx.array) -> None:
        """Puts these parameters in force."""
        # Gradients are taken by the tree: the gradient of a split adds up one whole vector per part.
        parameters = self.layout.split(vector)
        mx.eval(vector, parameters)
        self.vector, self.parameters = vector, parameters
        self.adapter.module.update(parameters)

    def _train_step(self) -> float:
        indices = self._batch(self.step)
        total = sum(len(self.examples[i].ids) - self.examples[i].start for i in indices)
        # One shard per worker runs at the same time; micro-batches are more of them, one after another.
        parts = shards([self.lengths[i] for i in indices], self.session.workers.count * self.config.accumulate)
        wanted = [[indices[i] for i in part] for part in parts]
        seeds = [((self.seed * 1_000_003 + self.step) * 1_009 + n) % 2**63 for n in range(len(parts))]
        jobs: list[Callable[[], Any]]
        self.adapter.before_step(self.step)
        with self.adapter.learning_from(indices):
            if self.native is not None:
                jobs = self.native.jobs(wanted, total, seeds)
            else:
                jobs = [partial(self._gradient, *each, total) for each in zip(seeds, wanted, strict=True)]
            extra = [self._extra_gradient] if isinstance(self.adapter, AdaLoRA) or self.adapter.penalty else []
            losses, gradients = zip(*self.session.workers.map([*jobs, *extra]), strict=True)
            self.noise.update(gradients[: len(jobs)], [len(part) for part in parts])
            if self.native is not None:
                gradients = (self.native.gradient(self.parameters, gradients[: len(jobs)]), *gradients[len(jobs) :])
        gradient: mx.array = sum(gradients[1:], gradients[0])
        if self.config.clip > 0:
            gradient, _ = optim.clip_grad_norm(gradient, self.config.clip)
        self.optimizer.learning_rate = learning_rate(self.config, self.step, self.steps)
        vector = self.optimizer.apply_gradients({"all": gradient}, {"all": self.vector})["all"]
        mx.eval(vector, gradient, self.optimizer.state)
        self._set(vector)
        if isinstance(self.adapter, AdaLoRA):
            by_path = {path.replace("/", "."): g for path, g in self.layout.split(gradient)["deltas"].items()}
            self.adapter.after_step(self.step, by_path)
            self._set(self.layout.join(self.adapter.module.trainable_parameters()))
        self.trial.tokens += sum(self.lengths[i] for i in indices)
        return sum(float(loss.item()) for loss in losses)

    def _gradient(self, seed: int, indices: list[int], total: int) -> tuple[mx.array, mx.array]:
        """A shard's token losses over the batch's number of tokens, summed, and the gradient of that as a vector."""
        whole = self.session.whole(len(indices))
        shard = self.session.shard("train", indices, self.start, whole)
        mx.random.seed(seed)  # each thread has its own state

        def loss(parameters: Any) -> mx.array:
            self.adapter.module.update(parameters)
            prefix = self.session.prefix(self.adapter, self.start, whole)
            logits = completion_logits(self.session.model, prefix, shard, self.start, checkpoint=self.config.checkpoint)
            return nn.losses.cross_entropy(logits.astype(mx.float32), shard.targets, reduction="sum") / total

        self.adapter.module.train()  # dropout, in this graph alone
        try:
            value, gradient = mx.value_and_grad(loss)(self.parameters)
        finally:
            self.adapter.module.eval()
        return value, self.layout.join(gradient)

    def _extra_gradient(self) -> tuple[mx.array, mx.array]:
        """Zero, and the gradient of the losses that are the same for any data: AdaLoRA's orthogonality, a penalty."""

        def loss(parameters: Any) -> mx.array:
            self.adapter.module.update(parameters)
            value = self.adapter.extra_loss()
            total = mx.array(0.0) if value is None else value
            return total if self.adapter.penalty is None else total + self.adapter.penalty()

        gradient = mx.grad(loss)(self.parameters)
        self.adapter.module.update(self.parameters)
        return mx.array(0.0), self.layout.join(gradient)

    def _check(self, loss: float) -> None:
        """Raises Diverged on NaN, and when the loss rose far above its lowest or back to that of guessing."""
        if not math.isfinite(loss):
            raise Diverged(f"the loss was {loss} at step {self.step}")
        recent, chance = sum(self.losses[-5:]) / len(self.losses[-5:]), self.session.chance
        self.lowest = min(self.lowest, recent)
        rose = recent > max(2.5 * self.lowest, self.lowest + 0.5 * chance)
        guesses = recent > 0.95 * chance and self.lowest < 0.85 * chance
        if len(self.losses) >= 10 and (rose or guesses):
            raise Diverged(f"the loss rose from {self.lowest:.2f} to {recent:.2f} by step {self.step}")

    def _evaluate(self) -> dict[str, Any]:
        self.adapter.before_step(self.steps)  # what opens over the first steps is judged, and saved, open
        predictions = predict(self.session, self.adapter, "validation", self.sample)
        found = score(self.session, predictions, "validation", self.sample)
        if not math.isfinite(found.loss):
            raise Diverged(f"the validation loss was {found.loss} at step {self.step}")
        self.since_best += 1
        if self.best is None or (found.value, -found.loss) > (self.best.value, -self.best.loss):
            self.best, self.since_best = found, 0
            self.best_vector, self.best_found = self.vector, predictions
        recent = self.losses[-max(1, self.steps // 10) :]
        row = {
            "step": self.step,
            "examples": self.step * self.config.batch_size,
            "seconds": round(self._elapsed(), 3),
            "train_loss": sum(recent) / max(1, len(recent)),
            "validation_loss": found.loss,
            "validation_score": found.value,
            "gradient_noise": self.noise.scale(),
        }
        self.trial.curve.append(row)
        return row

    def _save_state(self) -> None:
        """One file, replaced atomically, with everything a restarted run needs."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        groups = {
            "weights": {"all": self.vector},
            "optimizer": self.optimizer.state,
            "best": {} if self.best_vector is None else {"all": self.best_vector},
            "extra": self.adapter.state() if isinstance(self.adapter, AdaLoRA) else {},
        }
        arrays = {f"{group}|{name}": v for group, tree in groups.items() for name, v in leaves(tree)}
        mx.eval(arrays)
        facts = {
            "trial": self.trial.id,
            "format": STATE_FORMAT,
            "engine": engine(),
            "step": self.step,
            "losses": self.losses,
            "lowest": self.lowest,
            "best": asdict(self.best) if self.best else None,
            "since_best": self.since_best,
            "curve": self.trial.curve,
            "tokens": self.trial.tokens,
            "noise": self.noise.state,
            "seconds": self._elapsed(),
            "cpu_seconds": self.earlier_cpu_seconds + time.process_time() - self.begin_cpu,
            "peak_memory_mb": self.peak_memory_mb(),
            "sha256": digest(arrays),
        }
        temporary = self.folder / ".state.partial.safetensors"
        try:
            mx.save_safetensors(str(temporary), arrays, metadata={"state": json.dumps(facts)})
        except RuntimeError as error:  # MLX does not say why
            raise OSError(errno.ENOSPC, "the disk is full or cannot be written", str(temporary)) from error
        os.replace(temporary, self.folder / "state.safetensors")
        self.saved = time.perf_counter()

    def _resume(self) -> None:
        found = None if self.folder is None else saved_state(self.folder, self.trial.id)
        if found is None:
            return
        arrays, facts = found
        groups: dict[str, list[tuple[str, Any]]] = {"weights": [], "optimizer": [], "best": [], "extra": []}
        for name, value in arrays.items():
            group, key = name.split("|", 1)
            groups[group].append((key, value))
        self._set(dict(groups["weights"])["all"])
        self.optimizer.state = tree_unflatten(groups["optimizer"])
        if isinstance(self.adapter, AdaLoRA):
            self.adapter.restore(dict(groups["extra"]))
        if facts["best"]:
            self.best, self.best_vector = Score(**facts["best"]), dict(groups["best"])["all"]
        self.step, self.losses, self.since_best = facts["step"], facts["losses"], facts["since_best"]
        self.lowest = facts["lowest"]
        self.trial.curve, self.trial.tokens = facts["curve"], facts["tokens"]
        self.noise.state = facts.get("noise", self.noise.state)
        self.earlier_seconds, self.earlier_cpu_seconds = facts["seconds"], facts.get("cpu_seconds", 0.0)
        self.earlier_peak_mb = facts.get("peak_memory_mb", 0.0)


def saved_state(folder: Path, trial: str) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
    """Arrays and facts of the state that a trial, by its id, will continue from; None: it starts afresh."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, facts = loaded[0], json.loads(loaded[1]["state"])
        if (facts.get("trial"), facts.get("format"), facts.get("engine")) != (trial, STATE_FORMAT, engine()):
            return None
        mx.eval(arrays)  # they are read lazily, and the file is about to be replaced
        return None if facts.get("sha256") != digest(arrays) else (arrays, facts)
    except (RuntimeError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # not a whole state of ours


def digest(arrays: dict[str, mx.array]) -> str:
    """sha256 of names and values: safetensors itself notices a short file, but no changed one."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode() + b"\0")
        found.update(memoryview(arrays[name].reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
    return found.hexdigest()


def sample(examples: int) -> list[int] | None:
    """Which validation examples compare the weights of one run at different steps; None: all of them."""
    if examples <= SAMPLE:
        return None
    return sorted(np.random.default_rng(0).permutation(examples)[:SAMPLE].tolist())


def evaluated(steps: int, evaluations: int) -> set[int]:
    """After which steps a training is evaluated: as often as asked, but for rounding, and at its end."""
    every = max(1, round(steps / evaluations))
    return {s for s in range(every, steps, every) if steps - s >= every / 2} | {steps}


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then the schedule down to a tenth of it (or constant)."""
    warm = config.warmup * steps
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    progress = (step - warm) / max(1.0, steps - warm)
    falls = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * (0.1 + 0.9 * falls[config.schedule])


def _save(adapter: Adapter, folder: Path, trial: Trial, task: Task) -> None:
    from metapeft.peft import adapters

    trial.adapter = str(folder)
    adapters.save(adapter, folder, describe(trial, task))
    trial.adapter_bytes = (folder / "adapter_model.safetensors").stat().st_size


def describe(trial: Trial, task: Task) -> dict[str, Any]:
    """An adapter's metadata: what serving needs to ask as training did; no template if it was trained on chats."""
    template = task.template if isinstance(task.train[0].prompt, str) else ""
    form = {"name": task.name, "kind": task.kind, "labels": list(task.labels), "template": template}
    return {"trial": trial.to_json(), "backbone": trial.backbone, "steps": trial.budget, "task": form}
