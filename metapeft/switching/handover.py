"""From one method to the next without forgetting: what the old one learned, beneath or inside the new one.

    frozen      the new one changes linear layers and starts as an identity (B or E are zero); the old one lies beneath,
                merged into the weights or as keys and values: outputs stay as they are
    converted   virtual tokens become the start of other virtual tokens that can hold them: a prefix holds the keys and
                values of any, a prompt the embeddings of a prompt or P-tuning: outputs stay as they are
    gated       a prefix on matrices, which are merged, begins behind a closed gate: outputs stay as they are, and it
                opens until the first look
    distilled   other virtual tokens are trained until they put out what the old adapter does, on inputs whose old
                outputs are cached (Hinton et al. 2015, arXiv:1503.02531, at temperature 1)
    fresh       instead of distilled where nothing was learned yet: the new one starts on the bare backbone

By how much outputs did change is measured on a guard set that neither trained, and what lost too much is not done. At a
fresh start it is the backbone that must be no worse there than the old adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from metapeft.peft.base import Adapter
from metapeft.peft.stack import as_prefix, parts
from metapeft.peft.virtual import VirtualTokens
from metapeft.runtime import mx, optim
from metapeft.training.batches import batch_at
from metapeft.training.configuration import split
from metapeft.training.evaluation import Predictions, predict, score
from metapeft.training.session import Session, Shard, completion_logits

How = Literal["frozen", "converted", "gated", "distilled", "fresh"]
DISTILL_STEPS = 8
DISTILL_BATCHES = 4  # cached, and gone through again and again
GUARD = 64  # examples at most
CONFIRMED = 16  # of them where outputs stay as they are: enough to see that they do


@dataclass(frozen=True)
class Handover:
    """How a leg begins. configuration: as asked, except the number of tokens where they are the old ones. below: what
    stays frozen beneath. prepare: puts the start into the fresh adapter, attached on a session over `below`."""

    how: How
    configuration: dict[str, Any]
    below: Adapter | None
    prepare: Callable[[Session, Adapter], None] | None


@dataclass(frozen=True)
class Change:
    """Of the guard set's outputs at an exchange: token losses (nats per token), the share of answers that differ."""

    examples: int
    score_before: float
    score_after: float
    loss_before: float
    loss_after: float
    largest: float  # change of an example's loss
    mean: float
    answers: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Tokens = Literal["none", "embeddings", "keys"]  # what an adapter's virtual tokens are


def tokens(adapter: Adapter | None) -> Tokens:
    _, virtual = parts(adapter)
    return "none" if virtual is None else "embeddings" if isinstance(virtual, VirtualTokens) else "keys"


def how(old: Tokens, method: str, learned: bool = True) -> How:
    """The way from an adapter with such virtual tokens to a method. learned: whether it is better than the backbone."""
    if method in ("lora", "adalora"):
        return "frozen"
    if (method == "prefix" and old != "none") or (method == "prompt" and old == "embeddings"):
        return "converted"
    return "fresh" if not learned else "gated" if method == "prefix" else "distilled"


def exact(way: How) -> bool:
    """Whether outputs stay as they are."""
    return way in ("frozen", "converted", "gated")


def handover(
    session: Session, old: Adapter, configuration: dict[str, Any], seed: int, learned: bool = True
) -> Handover:
    """From `old` (not attached) to a configuration."""
    way = how(tokens(old), configuration["method"], learned)
    matrices, virtual = parts(old)
    if way == "fresh":
        return Handover(way, configuration, None, None)
    if way in ("frozen", "gated"):
        return Handover(way, configuration, old, None)
    if way == "converted":
        assert virtual is not None
        if configuration["method"] == "prefix":
            value = as_prefix(old, session.model).module()
            fixed: dict[str, Any] = {"projection": 0, "initialisation": "text"}
        else:
            assert isinstance(virtual, VirtualTokens)
            value, fixed = virtual.embeddings(), {"initialisation": "vocabulary"}
        mx.eval(value)

        def start(_: Session, adapter: Adapter) -> None:
            adapter.module.update({"value": value})

        return Handover(way, configuration | fixed | {"tokens": int(value.shape[0])}, matrices, start)
    cached = _cache(session, old, configuration, seed)
    rate = split(configuration)[1].learning_rate
    return Handover(way, configuration, matrices, lambda upper, adapter: _distil(upper, adapter, cached, rate))


@contextmanager
def over(session: Session, below: Adapter | None) -> Iterator[Session]:
    """The session with what lies beneath in force, if anything does."""
    if below is None:
        yield session
        return
    with session.over(below) as upper:
        yield upper


def guard(session: Session, way: How) -> list[int]:
    """Validation examples that compare outputs before and after: not those that choose weights, if there are others."""
    from metapeft.training.trainer import sample

    examples = len(session.encoded["validation"])
    chosen = set(sample(examples) or ())
    rest = [i for i in range(examples) if i not in chosen] or list(range(examples))
    order = np.random.default_rng(1).permutation(len(rest))[: CONFIRMED if exact(way) else GUARD]
    return sorted(rest[i] for i in order)


def change(session: Session, guarded: Sequence[int], before: Predictions, after: Predictions) -> Change:
    """By how much two predictions of the guarded validation examples differ."""
    losses = [p.loss_sum / np.maximum(1.0, p.tokens) for p in (before, after)]
    scores = [score(session, p, "validation", guarded) for p in (before, after)]
    different = np.abs(losses[1] - losses[0])
    if before.label_scores is not None and after.label_scores is not None:
        answers = before.label_scores.argmax(axis=1) != after.label_scores.argmax(axis=1)
    else:
        answers = before.exact != after.exact
    return Change(
        examples=len(guarded),
        score_before=scores[0].value,
        score_after=scores[1].value,
        loss_before=scores[0].loss,
        loss_after=scores[1].loss,
        largest=float(different.max()),
        mean=float(different.mean()),
        answers=float(answers.mean()),
    )


def predicted(session: Session, adapter: Adapter | None, guarded: Sequence[int]) -> Predictions:
    """Of an adapter that is not attached, or of the bare backbone, whose answers may be known."""
    if adapter is None:
        known = session.untuned_answers.get("validation")
        return predict(session, None, "validation", guarded) if known is None else known.at(guarded)
    adapter.attach(session.model)
    try:
        return predict(session, adapter, "validation", guarded)
    finally:
        adapter.detach(session.model)


def _cache(
    session: Session, old: Adapter, configuration: dict[str, Any], seed: int
) -> list[tuple[list[int], mx.array]]:
    """Batches of training examples, and the log-probabilities that the old adapter gives at their completions."""
    lengths = [e.length for e in session.encoded["train"]]
    size = split(configuration)[1].batch_size
    old.attach(session.model)
    try:
        prefix = session.prefix(old)
        found = []
        for step in range(DISTILL_BATCHES):
            indices = batch_at(lengths, size, seed + 1, step)
            logits = completion_logits(session.model, prefix, _shard(session, indices), 0).astype(mx.float32)
            logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            mx.eval(logs)
            found.append((indices, logs))
        return found
    finally:
        old.detach(session.model)


def _distil(session: Session, adapter: Adapter, cached: Sequence[tuple[list[int], mx.array]], rate: float) -> None:
    """Trains the attached adapter until it puts out what is cached: the Kullback-Leibler divergence goes down."""
    optimizer = optim.Adam(learning_rate=rate)
    module = adapter.module
    shards = [_shard(session, indices) for indices, _ in cached]

    def divergence(parameters: Any, shard: Shard, logs: mx.array) -> mx.array:
        module.update(parameters)
        logits = completion_logits(session.model, session.prefix(adapter), shard, 0).astype(mx.float32)
        mine = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.mean(mx.sum(mx.exp(logs) * (logs - mine), axis=-1))

    parameters = module.trainable_parameters()
    best, kept = float("inf"), parameters
    for step in range(DISTILL_STEPS):
        place = step % len(cached)
        value, gradient = mx.value_and_grad(divergence)(parameters, shards[place], cached[place][1])
        if place == 0 and float(value) < best:  # the same batch each time: losses of others do not compare
            best, kept = float(value), parameters
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        parameters = optimizer.apply_gradients(gradient, parameters)
        mx.eval(parameters, optimizer.state)
    final = float(divergence(parameters, shards[0], cached[0][1]))
    module.update(parameters if final < best else kept)
    mx.eval(module.parameters())


def _shard(session: Session, indices: Sequence[int]) -> Shard:
    return session.shard("train", indices, 0)
