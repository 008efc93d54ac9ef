"""Tasks one after another, and what is left of the earlier ones: continual learning.

    naive      one adapter goes on from task to task
    replay     the same, with a few examples of each earlier task among the new ones (Chaudhry et al. 2019,
               arXiv:1902.10486)
    ewc        the same, held where parameters mattered to earlier tasks: elastic weight consolidation (Kirkpatrick et
               al. 2017, arXiv:1612.00796) with the diagonal of the empirical Fisher information
    l2         the same, held everywhere alike
    adapters   a frozen adapter per task; whoever asks names the task. Nothing can be forgotten

Measured after every task on all tasks so far. Average accuracy and backward transfer are those of Lopez-Paz and
Ranzato 2017 (arXiv:1706.08840), forgetting that of Chaudhry et al. 2018 (arXiv:1801.10112): how far a task has fallen
below its best. Drift is what the backbone loses outside all tasks: the change of its perplexity on a fixed text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from filelock import FileLock

from metapeft.backbones.forward import PrefixCache, run
from metapeft.data.task import Task
from metapeft.errors import MetapeftError, UserError
from metapeft.peft import adapters
from metapeft.peft.adalora import AdaLoRA
from metapeft.peft.base import Adapter
from metapeft.runtime import mx
from metapeft.training.configuration import full
from metapeft.training.encode import plain_ids
from metapeft.training.evaluation import evaluate, untuned
from metapeft.training.session import Session, completion_logits
from metapeft.training.trainer import run_trial
from metapeft.training.trial import Trial
from metapeft.training.vector import leaves

if TYPE_CHECKING:
    from metapeft.backbones import Backbone

Kind = Literal["naive", "replay", "ewc", "l2", "adapters"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FISHER = 32  # examples that tell which parameters matter
FORMAT = 2
# What a backbone should still be able to read after it was tuned.
TEXT = """The harbour lies at the mouth of a slow river, and for most of the year the wind comes from the west. Small
boats leave before dawn and return around noon, when the market on the quay is already half empty. A lighthouse was
built here two hundred years ago after a storm had driven three ships onto the rocks in a single night; its lamp was
first lit with oil, later with gas, and today an electric bulb no larger than a fist can be seen from twenty miles away.
In winter the town is quiet. The school has eighty pupils, the library opens on Tuesdays and Fridays, and the bus to the
city takes a little more than an hour. People who grew up here say that the sea decides everything: what there is to
eat, who goes to work, and when the road along the coast must be closed."""


@dataclass(frozen=True)
class Keep:
    """How earlier tasks are kept. buffer: examples of each that are replayed. strength: of the penalty (None: 300 for
    EWC, 0.03 for L2)."""

    kind: Kind = "adapters"
    buffer: int = 32
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown way to keep earlier tasks {self.kind!r}; choose from {', '.join(KINDS)}")
        if self.buffer < 1 or (self.strength is not None and self.strength < 0):
            raise UserError("buffer must be at least 1 and strength at least 0")

    @property
    def pull(self) -> float:
        return self.strength if self.strength is not None else {"ewc": 300.0, "l2": 0.03}.get(self.kind, 0.0)


@dataclass
class Learned:
    """The outcome. scores[i][j]: test score of task j after task i, for j up to i. perplexity: of the bare backbone on
    TEXT, then after each task. trials: of each task, scored when it was learned. models: what `register` made of it."""

    id: str
    keep: dict[str, Any]
    tasks: list[str]
    untuned: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)  # folders
    models: list[dict[str, Any]] = field(default_factory=list)

    @property
    def average_accuracy(self) -> float:
        return float(np.mean(self.scores[-1]))

    @property
    def backward_transfer(self) -> float:
        """Mean change of the earlier tasks since each was learned."""
        return _mean([self.scores[-1][j] - self.scores[j][j] for j in range(len(self.scores) - 1)])

    @property
    def forgetting(self) -> float:
        """Mean distance of the earlier tasks from their best before the last task."""
        last = len(self.scores) - 1
        return _mean([max(self.scores[i][j] for i in range(j, last)) - self.scores[-1][j] for j in range(last)])

    @property
    def drift(self) -> float:
        """Relative change of the perplexity."""
        return self.perplexity[-1] / self.perplexity[0] - 1

    def to_json(self) -> dict[str, Any]:
        names = ("average_accuracy", "backward_transfer", "forgetting", "drift")
        return {"format": FORMAT, **asdict(self)} | {name: getattr(self, name) for name in names if self.scores}


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def train_sequence(
    backbone: Backbone,
    tasks: Sequence[Task],
    configuration: dict[str, Any],
    keep: Keep | None = None,
    *,
    steps: int,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[int, dict[str, Any]], None] | None = None,
) -> Learned:
    """Trains the tasks in their order, `steps` each, and measures all tasks so far after each.

    folder: where adapters and the record go; a killed sequence continues there with the task it was at. progress:
    called with the task's index and the trainer's events. Two processes with one folder take turns.

    Raises UserError for a method whose adapters cannot go on from their files, MetapeftError when a training fails.
    """
    keep = keep or Keep()
    configuration = full(configuration)
    if keep.kind != "adapters" and (configuration["method"] == "p_tuning" or configuration.get("projection")):
        raise UserError(
            f"{configuration['method']} trains through an encoder, which its adapter does not keep: use another method,"
            " or keep=adapters"
        )
    work = [[t.name, t.version, len(t.train), *([t.metric] if t.metric == "macro_f1" else [])] for t in tasks]
    name = _hash([work, backbone.identity, configuration, asdict(keep), steps, seed])
    if folder is None:
        from metapeft.settings import home

        folder = home() / "sequences" / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # another process with the same sequence waits, and finds it done
        found = _read(folder, name) or Learned(name, asdict(keep), [t.name for t in tasks])
        sessions = [Session(backbone, task) for task in tasks]
        if not found.untuned:
            found.untuned = [untuned(session, "test").value for session in sessions]
            found.perplexity = [perplexity(sessions[0], None)]
        for number in range(len(found.scores), len(tasks)):
            one = _Task(name, sessions, number, configuration, keep, folder)
            if number == len(found.trials):  # else a kill came while it was measured
                trial = one.train(steps, seed, None if progress is None else (lambda e, n=number: progress(n, e)))  # type: ignore[misc]
                found.trials.append(trial.to_json())
                found.adapters.append(str(folder / f"task-{number}"))
                _write(folder, found)
            one.measure(found)
            _write(folder, found)
    return found


class _Task:
    """One task of a sequence."""

    def __init__(
        self,
        sequence: str,
        sessions: Sequence[Session],
        number: int,
        configuration: dict[str, Any],
        keep: Keep,
        folder: Path,
    ):
        self.sequence, self.sessions, self.number = sequence, sessions, number
        self.configuration, self.keep, self.folder = configuration, keep, folder
        self.carried = number > 0 and keep.kind != "adapters"

    def train(self, steps: int, seed: int, progress: Callable[[dict[str, Any]], None] | None) -> Trial:
        session = self.sessions[self.number]
        if self.keep.kind == "replay" and self.carried:
            session = Session(session.backbone, self.mixed(seed))

        def prepare(adapter: Adapter) -> None:
            before = self.load(self.number - 1)
            if isinstance(adapter, AdaLoRA) and isinstance(before, AdaLoRA):
                adapter.take_over(before)
            else:
                adapter.module.update(before.module.trainable_parameters())
            mx.eval(adapter.module.parameters())
            if self.keep.pull:
                adapter.penalty = self.penalty(adapter)

        trial = run_trial(
            session,
            self.configuration,
            steps=steps,
            seed=seed,
            folder=self.folder / f"task-{self.number}",
            test=False,
            prepare=prepare if self.carried else None,
            start=f"{self.sequence}/{self.number}" if self.carried else "",
            progress=progress,
        )
        if trial.status != "ok":
            raise MetapeftError(f"training {session.task.name} ended as {trial.status} ({trial.error})")
        if self.keep.kind == "ewc":
            self.remember(session)
        return trial

    def mixed(self, seed: int) -> Task:
        """The task with the buffer of the earlier ones among its training examples."""
        task = self.sessions[self.number].task
        old = []
        for session in self.sessions[: self.number]:
            order = np.random.default_rng((seed, 7)).permutation(len(session.task.train))[: self.keep.buffer]
            old += [session.task.train[i] for i in sorted(order)]
        return replace(task, train=(*task.train, *old))

    def load(self, number: int) -> Adapter:
        adapter = adapters.load(self.folder / f"task-{number}", self.sessions[0].model)
        mx.eval(adapter.module.parameters())
        return adapter

    def penalty(self, adapter: Adapter) -> Callable[[], mx.array]:
        """strength / 2 * sum over earlier tasks and parameters of F (theta - theta of that task)^2."""
        anchors: list[tuple[dict[str, mx.array], dict[str, mx.array] | None]] = []
        if self.keep.kind == "ewc":
            for number in range(self.number):
                weights = dict(leaves(self.load(number).module.trainable_parameters()))
                fisher = mx.load(str(self.folder / f"fisher-{number}.safetensors"))
                assert isinstance(fisher, dict)
                mx.eval(fisher)
                anchors.append((weights, fisher))
        else:
            anchors.append((dict(leaves(adapter.module.trainable_parameters())), None))  # where it begins

        def value() -> mx.array:
            total = mx.array(0.0)
            for name, parameter in leaves(adapter.module.trainable_parameters()):
                for weights, fisher in anchors:
                    away = (parameter - weights[name]) ** 2
                    total = total + mx.sum(away if fisher is None else fisher[name] * away)
            return 0.5 * self.keep.pull * total

        return value

    def remember(self, session: Session) -> None:
        """Writes the diagonal of the empirical Fisher information at the adapter's weights: mean squared gradients of
        the log-likelihood of single examples."""
        adapter = self.load(self.number)
        adapter.attach(session.model)
        try:
            total: dict[str, mx.array] = {}
            parameters = adapter.module.trainable_parameters()
            order = np.random.default_rng(3).permutation(len(session.encoded["train"]))[:FISHER]
            for index in order.tolist():
                shard = session.shard("train", [index], 0)

                def loss(values: Any, shard: Any = shard) -> mx.array:
                    adapter.module.update(values)
                    logits = completion_logits(session.model, session.prefix(adapter), shard, 0).astype(mx.float32)
                    gold = mx.take_along_axis(logits, shard.targets[:, None], axis=-1)[:, 0]
                    return mx.sum(mx.logsumexp(logits, axis=-1) - gold)

                gradient = mx.grad(loss)(parameters)
                for name, value in leaves(gradient):
                    total[name] = total.get(name, mx.array(0.0)) + value * value / len(order)
                mx.eval(total)
            adapter.module.update(parameters)
        finally:
            adapter.detach(session.model)
        path = self.folder / f"fisher-{self.number}.safetensors"
        temporary = path.with_name(f".partial-{path.name}")
        mx.save_safetensors(str(temporary), total)
        os.replace(temporary, path)

    def measure(self, found: Learned) -> None:
        """Adds a row: scores of all tasks so far, and the perplexity."""
        row = []
        own = self.keep.kind == "adapters"
        for number in range(self.number + 1):
            session = self.sessions[number]
            adapter = self.load(number if own else self.number)
            adapter.attach(session.model)
            try:
                score = evaluate(session, adapter, "test")
            finally:
                adapter.detach(session.model)
            row.append(score.value)
        found.scores.append(row)
        found.trials[-1] |= {"score": asdict(score), "untuned_score": asdict(untuned(session, "test"))}
        # Text that belongs to no task meets the backbone alone where every task has an adapter of its own.
        found.perplexity.append(perplexity(self.sessions[0], None if own else self.load(self.number)))


def perplexity(session: Session, adapter: Adapter | None) -> float:
    """Of the backbone on TEXT, with `adapter` (not attached) in force."""
    ids = plain_ids(TEXT, session.backbone.tokenizer)
    ids = ids[: session.backbone.context_length // 2]
    if adapter is not None:
        adapter.attach(session.model)
    try:
        prefix = None if adapter is None else adapter.prefix(session.model)
        cache = None if prefix is None else [PrefixCache(keys, values) for keys, values in prefix]
        logits = run(session.model, mx.array([ids[:-1]]), cache=cache)[0].astype(mx.float32)
        gold = mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
        return math.exp(float(mx.mean(mx.logsumexp(logits, axis=-1) - gold)))
    finally:
        if adapter is not None:
            adapter.detach(session.model)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read(folder: Path, name: str) -> Learned | None:
    try:
        found = json.loads((folder / "sequence.json").read_text(encoding="utf-8"))
        fields = {k: found[k] for k in Learned.__dataclass_fields__ if k != "models"}
    except (OSError, ValueError, KeyError):
        return None
    return Learned(**fields) if (found["format"], found["id"]) == (FORMAT, name) else None


def _write(folder: Path, found: Learned) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".sequence.json.partial"
    temporary.write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    os.replace(temporary, folder / "sequence.json")
