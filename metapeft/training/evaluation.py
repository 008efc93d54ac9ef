"""Evaluation without generation: one forward pass gives loss, exact match and the likelihood of each label."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from metapeft.backbones.forward import Prefix, PrefixCache, RecordingCache, caches, run
from metapeft.data.rows import listed
from metapeft.data.task import SPLITS, Example
from metapeft.errors import UserError
from metapeft.kernels.decoder import Decoder
from metapeft.peft.base import Adapter
from metapeft.runtime import mx
from metapeft.training import native
from metapeft.training.encode import Encoded, encode
from metapeft.training.session import Session, completion_logits
from metapeft.training.trial import Score
from metapeft.training.trunk import pad

CHUNK_TOKENS = 288  # padded tokens per forward pass: large enough for fast products, small enough for the caches


@dataclass
class Predictions:
    """Per example: token losses summed and counted, exact match, and for classification the scores of all labels.

    label_scores: (examples, labels), log-likelihood of each label up to the token that tells it from all others.
    """

    loss_sum: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    label_scores: np.ndarray | None

    def at(self, indices: Sequence[int]) -> Predictions:
        """For these examples, in that order."""
        places = list(indices)
        labels = None if self.label_scores is None else self.label_scores[places]
        return Predictions(self.loss_sum[places], self.tokens[places], self.exact[places], labels)


def evaluate(session: Session, adapter: Adapter | None, split: str, indices: Sequence[int] | None = None) -> Score:
    """The task's metric on a split (or some of its examples), with its standard error and the token-level loss.

    The adapter must be attached.
    """
    return score(session, predict(session, adapter, split, indices), split, indices)


def untuned(session: Session, split: str) -> Score:
    """The score of the backbone alone (nothing attached), computed once per session."""
    if split not in session.untuned:
        session.untuned_answers[split] = found = predict(session, None, split)
        session.untuned[split] = score(session, found, split)
    return session.untuned[split]


def predict(session: Session, adapter: Adapter | None, split: str, indices: Sequence[int] | None = None) -> Predictions:
    """Predictions for the examples at `indices` (all of them by default), in that order."""
    places = range(len(session.encoded[split])) if indices is None else indices
    examples = [session.encoded[split][i] for i in places]
    start = session.start(adapter)
    if adapter is not None:
        mx.eval(adapter.module.parameters())  # read from disk they are lazy, and bound to this thread's stream
    if start > 0:
        session.trunk(split, start).prepare(places, session.workers)
    labels = Labels(session) if session.task.kind == "classification" else None
    result = Predictions(
        np.zeros(len(examples)),
        np.zeros(len(examples)),
        np.zeros(len(examples), dtype=bool),
        np.zeros((len(examples), len(session.task.labels))) if labels else None,
    )
    view = native.usable(session, adapter)
    if view is not None:
        known = partial(native.known_prefix, session, view, adapter, start)
    else:
        known = partial(session.prefix, adapter, start)
    [prefix] = session.workers.map([known])

    def run_chunk(chunk: list[int]) -> Any:
        """Per completion token its loss and whether it was hit; per example each label's first log-likelihood."""
        if view is not None:
            return run_natively(view, chunk)
        shard = session.shard(split, [places[i] for i in chunk], start)
        logits = completion_logits(session.model, prefix, shard, start).astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1)
        gold = mx.take_along_axis(logits, shard.targets[:, None], axis=-1)[:, 0]
        hit = mx.argmax(logits, axis=-1) == shard.targets
        if labels is None:
            return total - gold, hit, gold
        firsts = mx.array(np.cumsum([0, *shard.spans[:-1]]))
        return total - gold, hit, logits[firsts][:, labels.roots] - total[firsts][:, None]

    def run_natively(view: Decoder, chunk: list[int]) -> Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        roots = labels.roots_list if labels else []
        call = native.predicted(session, view, prefix, split, [places[i] for i in chunk], start, roots)
        spans = [len(examples[i].ids) - examples[i].start for i in chunk]
        firsts = np.cumsum([0, *spans[:-1]])

        def compute() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            found = call()
            return found.loss, found.hit, found.root_scores[firsts]

        return compute

    chunks = chunked([e.length for e in examples])
    found = session.workers.map([partial(run_chunk, chunk) for chunk in chunks])
    for chunk, (losses, hit, roots) in zip(chunks, found, strict=True):
        end = 0
        for row, index in enumerate(chunk):
            begin, end = end, end + len(examples[index].ids) - examples[index].start
            result.loss_sum[index] = float(np.array(losses[begin:end], dtype=np.float64).sum())
            result.tokens[index] = end - begin
            result.exact[index] = bool(np.array(hit[begin:end]).all())
            if result.label_scores is not None:
                result.label_scores[index] = np.array(roots[row], dtype=np.float64)
    if labels and labels.paths:
        assert result.label_scores is not None
        labels.add_deeper(session, adapter, examples, result.label_scores)
    return result


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Predictions for all examples of the parts, in their order."""
    labels = [p.label_scores for p in parts if p.label_scores is not None]
    return Predictions(
        np.concatenate([p.loss_sum for p in parts]),
        np.concatenate([p.tokens for p in parts]),
        np.concatenate([p.exact for p in parts]),
        np.concatenate(labels) if labels else None,
    )


def score(session: Session, predictions: Predictions, split: str, indices: Sequence[int] | None = None) -> Score:
    """What `predict` found, as the task's metric."""
    task = session.task
    examples = task.split(split) if indices is None else [task.split(split)[i] for i in indices]
    loss = float(predictions.loss_sum.sum() / max(1.0, predictions.tokens.sum()))
    n = len(predictions.exact)
    if task.kind == "classification":
        assert predictions.label_scores is not None
        chosen = predictions.label_scores.argmax(axis=1)
        truth = np.array([task.labels.index(e.completion.strip()) for e in examples])
        if task.metric == "macro_f1":
            value, error = macro_f1(truth, chosen, len(task.labels))
            return Score("macro_f1", value, error, n, loss)
        hits = chosen == truth
    else:
        hits = predictions.exact
    return Score(task.metric, float(hits.mean()), proportion_error(float(hits.mean()), n), n, loss)


def proportion_error(p: float, n: int) -> float:
    """Standard error of a proportion, with two successes and two failures added (Agresti and Coull 1998) so that it is
    not zero at 0 or 1."""
    shrunk = (p * n + 2) / (n + 4)
    return math.sqrt(shrunk * (1 - shrunk) / (n + 4))


def macro_f1(truth: np.ndarray, chosen: np.ndarray, labels: int, resamples: int = 200) -> tuple[float, float]:
    """Mean F1 over the labels that occur, and its bootstrap standard error (seeded)."""

    def value(t: np.ndarray, c: np.ndarray) -> float:
        counts = np.zeros((labels, labels))
        np.add.at(counts, (t, c), 1)
        hit, real, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
        present = (real + said) > 0
        return float((2 * hit[present] / (real + said)[present]).mean())

    random = np.random.default_rng(0)
    draws = [random.integers(0, len(truth), len(truth)) for _ in range(resamples)]
    return value(truth, chosen), float(np.std([value(truth[d], chosen[d]) for d in draws]))


def chunked(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of similar length, at most CHUNK_TOKENS padded tokens each (at least one example)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    chunks: list[list[int]] = []
    for index in order:
        # A group ends when full, or when padding its first example to this length would waste a quarter of it.
        full = bool(chunks) and (len(chunks[-1]) + 1) * lengths[index] > CHUNK_TOKENS
        if not chunks or full or lengths[index] > 1.25 * lengths[chunks[-1][0]] + 2:
            chunks.append([])
        chunks[-1].append(index)
    return chunks


class Labels:
    """Labels as token sequences, and how far each must be read until no other label continues the same way.

    Most label sets differ in their first token: then the prompt's last position decides. Where labels share first
    tokens, the shared beginnings (`paths`) are run after the prompt and the later tokens' likelihoods added.
    """

    def __init__(self, session: Session):
        task, tokenizer = session.task, session.backbone.tokenizer
        # A label's own completion (with its leading space, if any) is taken from an example that has it.
        seen = {e.completion.strip(): e.completion for split in SPLITS for e in task.split(split)}
        sequences = []
        for number, label in enumerate(task.labels):
            encoded = encode(Example("", seen[label] if label in seen else task.label_completions[number]), tokenizer)
            sequences.append(encoded.ids[encoded.start :])
        if len(set(sequences)) < len(sequences):
            same = [label for label, s in zip(task.labels, sequences, strict=True) if sequences.count(s) > 1]
            raise UserError(f"the backbone's tokenizer reads these labels alike: {listed(same)}; write them otherwise")
        self.sequences = sequences
        self.roots_list = [s[0] for s in sequences]
        self.roots = mx.array(self.roots_list)
        self.decided = [
            next(d for d in range(1, len(s) + 1) if sum(o[:d] == s[:d] for o in sequences) == 1) for s in sequences
        ]
        nodes = {s[:d] for s, end in zip(sequences, self.decided, strict=True) for d in range(1, end)}
        self.paths = sorted(n for n in nodes if not any(o != n and o[: len(n)] == n for o in nodes))

    def add_deeper(
        self, session: Session, adapter: Adapter | None, examples: Sequence[Encoded], scores: np.ndarray
    ) -> None:
        """Adds to `scores` (examples, labels) what the tokens after the first say."""
        by_length: dict[int, list[int]] = {}
        for index, example in enumerate(examples):
            by_length.setdefault(example.start, []).append(index)
        [prefix] = session.workers.map([lambda: session.prefix(adapter)])
        longest = max(len(p) for p in self.paths)
        paths = mx.array([pad(p, longest) for p in self.paths])
        per_batch = max(1, CHUNK_TOKENS // (len(self.paths) * longest))
        groups = []
        for length, indices in by_length.items():
            step = max(1, min(per_batch, CHUNK_TOKENS // length))
            groups += [indices[i : i + step] for i in range(0, len(indices), step)]

        def run_group(indices: list[int]) -> mx.array:
            prompts = [examples[i] for i in indices]
            return self._path_scores(session, prefix, mx.array([p.ids[: p.start] for p in prompts]), paths)

        found = session.workers.map([partial(run_group, indices) for indices in groups])
        for indices, values in zip(groups, found, strict=True):
            for row, index in enumerate(indices):
                scores[index] += np.array(values[row], dtype=np.float64)

    def _path_scores(self, session: Session, prefix: Prefix | None, ids: mx.array, paths: mx.array) -> mx.array:
        """Log-likelihood of each label's tokens after the first, up to the deciding one: (examples, labels)."""
        batch, count = ids.shape[0], paths.shape[0]
        before = [RecordingCache() for _ in range(session.depth)] if prefix is None else caches(prefix)
        run(session.model, ids, cache=before, logits=False)
        repeated = []
        for each in before:
            keys, values = (mx.repeat(held, count, axis=0) for held in each.held())
            repeated.append(PrefixCache(keys, values, each.gate))
        tokens = mx.concatenate([paths] * batch, axis=0)
        logits = run(session.model, tokens, cache=repeated).astype(mx.float32)
        logs = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).reshape(batch, count, paths.shape[1], -1)
        columns = []
        for sequence, end in zip(self.sequences, self.decided, strict=True):
            total = mx.zeros((batch,))
            if end > 1:
                path = next(i for i, p in enumerate(self.paths) if p[: end - 1] == sequence[: end - 1])
                for depth in range(1, end):
                    total = total + logs[:, path, depth - 1, sequence[depth]]
            columns.append(total)
        return mx.stack(columns, axis=1)
