"""What the untuned backbone makes of a task: one forward pass over a bounded number of training examples.

The same pass gives the zero-shot loss and score (teacher forcing, see `metapeft.training.evaluation`) and the mean of
the last hidden states over each prompt, on which a linear probe and nearest neighbours are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from metapeft.data.task import Task
from metapeft.errors import UserError
from metapeft.profiling.text import sample
from metapeft.training.trial import Score

if TYPE_CHECKING:
    from metapeft.backbones import Backbone
    from metapeft.runtime import mx
    from metapeft.training.encode import Encoded
    from metapeft.training.evaluation import Predictions
    from metapeft.training.session import Session

EXAMPLES = 128
TOKENS = 12_000  # long texts: fewer examples, but at least LEAST
LEAST = 32
NEIGHBOURS = 5
DIMENSIONS = 16
# Texts as different as texts are. Their hidden states say where the middle is and how far apart things lie.
REFERENCE = (
    "The committee approved the annual budget after a long debate on Tuesday.",
    "lol u coming 2nite?? txt me b4 9 :)",
    "def area(r):\n    return 3.14159 * r ** 2",
    "What is 17 * 23? 391",
    "The patient was given 5 mg of the drug twice a day and recovered.",
    "Der Zug nach Hamburg fährt heute leider nicht.",
    "Absolutely loved it. The soup was hot, the staff were kind, and we will be back!",
    "La casa está en la calle principal, cerca del río.",
)


@dataclass(frozen=True)
class Probe:
    """What the pass found. `states`: (examples, width), float64; `labels`: index of each example's label, or empty."""

    zero_shot: Score
    exact_match: float
    states: np.ndarray
    labels: np.ndarray
    domain: np.ndarray  # (DIMENSIONS,)


def probe(task: Task, backbone: Backbone) -> Probe:
    """Runs the backbone. Raises UserError for rows that are longer than its context."""
    from metapeft.data.shots import spelled
    from metapeft.training.encode import encode, encode_task
    from metapeft.training.evaluation import score
    from metapeft.training.session import Session

    chosen, tokens = [], 0
    for index in sample(task.train, EXAMPLES):
        chosen.append(index)
        tokens += encode(task.train[index], backbone.tokenizer).length
        if tokens > TOKENS and len(chosen) >= LEAST:
            break
    examples = tuple(task.train[i] for i in chosen)
    try:
        session = Session(backbone, replace(task, train=spelled(task), validation=examples, test=()))
    except UserError:
        encode_task(task, backbone.tokenizer, backbone.context_length)  # says the same of all rows, by their places
        raise
    predictions, states = _forward(session, "validation")
    truth = [task.labels.index(e.completion.strip()) for e in examples] if task.labels else []
    return Probe(
        zero_shot=score(session, predictions, "validation"),
        exact_match=float(predictions.exact.mean()),
        states=states,
        labels=np.array(truth, dtype=int),
        domain=_domain(session, states.mean(axis=0)),
    )


def features(found: Probe) -> dict[str, float]:
    """Complexity as the backbone sees it; the label measures are 0 where there are no labels or too few examples."""
    accuracy, disagreement = 0.0, 0.0
    if len(set(found.labels.tolist())) > 1:
        accuracy = linear_probe(found.states, found.labels)
        disagreement = neighbour_disagreement(found.states, found.labels)
    return {
        "zero_shot_loss": found.zero_shot.loss,
        "zero_shot_score": found.zero_shot.value,
        "zero_shot_standard_error": found.zero_shot.standard_error,
        "zero_shot_exact": found.exact_match,
        "probe_accuracy": accuracy,
        "neighbour_disagreement": disagreement,
        **{f"domain_{i:02d}": float(value) for i, value in enumerate(found.domain)},
    }


def linear_probe(states: np.ndarray, labels: np.ndarray) -> float:
    """Cross-validated accuracy of L2 logistic regression on standardised states. Labels seen once count as wrong."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = np.bincount(labels)
    usable = counts[labels] > 1
    if len(set(labels[usable].tolist())) < 2:
        return 0.0
    folds = StratifiedKFold(max(2, min(5, counts[counts > 1].min())), shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    predicted = cross_val_predict(model, states[usable], labels[usable], cv=folds)
    return float((predicted == labels[usable]).sum() / len(labels))


def neighbour_disagreement(states: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose label is not the commonest among their nearest (cosine, standardised states)."""
    scaled = (states - states.mean(axis=0)) / np.maximum(states.std(axis=0), 1e-9)
    scaled /= np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-9)
    similarity = scaled @ scaled.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(labels) - 1)]
    commonest = np.array([np.bincount(labels[row]).argmax() for row in nearest])
    return float((commonest != labels).mean())


def _forward(session: Session, split: str) -> tuple[Predictions, np.ndarray]:
    """(Predictions, states) of a split, with nothing attached."""
    from metapeft.backbones.forward import PrefixCache, run
    from metapeft.runtime import mx
    from metapeft.training.evaluation import Labels, Predictions, chunked

    encoded = session.encoded[split]
    labels = Labels(session) if session.task.kind == "classification" else None
    n = len(encoded)
    scores = np.zeros((n, len(session.task.labels))) if labels else None
    result = Predictions(np.zeros(n), np.zeros(n), np.zeros(n, dtype=bool), scores)
    states: list[np.ndarray | None] = [None] * n
    first, last = _varying(encoded)
    prefix = session.prefix(None)
    mx.eval(prefix)

    def job(chunk: list[int]) -> list[mx.array]:
        shard = session.shard(split, chunk, 0)
        cache = None if prefix is None else [PrefixCache(keys, values) for keys, values in prefix]
        hidden = run(session.model, shard.ids, cache=cache, logits=False)
        pooled = _pool(session, hidden, [(first, max(first + 1, encoded[i].start - last)) for i in chunk])
        logits = run(session.model, shard.ids, start=session.depth, hidden=hidden, rows=shard.rows)[0]
        logits = logits.astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1)
        gold = mx.take_along_axis(logits, shard.targets[:, None], axis=-1)[:, 0]
        hit = mx.argmax(logits, axis=-1) == shard.targets
        starts = mx.array(np.cumsum([0, *shard.spans[:-1]]))
        roots = logits[starts][:, labels.roots] - total[starts][:, None] if labels else gold
        return [pooled, total - gold, hit, roots]

    chunks = chunked([e.length for e in encoded])
    found = session.workers.map([partial(job, chunk) for chunk in chunks])
    for chunk, (pooled, losses, hit, roots) in zip(chunks, found, strict=True):
        end = 0
        for row, index in enumerate(chunk):
            span = len(encoded[index].ids) - encoded[index].start
            part, end = slice(end, end + span), end + span
            result.loss_sum[index] = float(np.array(losses[part], dtype=np.float64).sum())
            result.tokens[index] = span
            result.exact[index] = bool(np.array(hit[part]).all())
            states[index] = np.array(pooled[row], dtype=np.float64)
            if scores is not None:
                scores[index] = np.array(roots[row], dtype=np.float64)
    if labels is not None and scores is not None and labels.paths:
        labels.add_deeper(session, None, encoded, scores)
    return result, np.stack([s for s in states if s is not None])


def _varying(encoded: Sequence[Encoded]) -> tuple[int, int]:
    """How many tokens all prompts begin and end with (the template)."""
    prompts = [e.ids[: e.start] for e in encoded]
    shortest = min(map(len, prompts))
    first = next((i for i in range(shortest) if len({p[i] for p in prompts}) > 1), shortest - 1)
    last = next((i for i in range(shortest - first) if len({p[-1 - i] for p in prompts}) > 1), 0)
    return first, last


def _pool(session: Session, hidden: mx.array, spans: Sequence[tuple[int, int]]) -> mx.array:
    """Mean over each row's span of the states after the last norm: (rows, width), float32."""
    from metapeft.backbones.forward import anatomy
    from metapeft.runtime import mx

    parts = anatomy(session.model)
    places = mx.arange(hidden.shape[1])[None]
    begin, end = mx.array([s for s, _ in spans])[:, None], mx.array([e for _, e in spans])[:, None]
    inside = ((places >= begin) & (places < end)).astype(mx.float32)[..., None]
    states = getattr(parts.body, parts.norm)(hidden).astype(mx.float32)
    return (states * inside).sum(axis=1) / inside.sum(axis=1)


def _domain(session: Session, centre: np.ndarray) -> np.ndarray:
    """The task's mean state relative to REFERENCE (length 1: as far as those texts lie from their middle), projected by
    a fixed Gaussian matrix, which keeps distances (Johnson and Lindenstrauss 1984)."""
    from metapeft.backbones.forward import run
    from metapeft.runtime import mx
    from metapeft.training.encode import plain_ids

    tokenizer = session.backbone.tokenizer
    points = []
    for reference in REFERENCE:
        ids = mx.array([plain_ids(reference, tokenizer)[: session.backbone.context_length]])
        hidden = run(session.model, ids, logits=False)
        points.append(np.array(_pool(session, hidden, [(0, ids.shape[1])]), dtype=np.float64)[0])
    middle = np.mean(points, axis=0)
    scale = np.sqrt(np.mean([np.sum((p - middle) ** 2) for p in points]))
    matrix = np.random.default_rng(0).normal(size=(len(middle), DIMENSIONS)) / np.sqrt(DIMENSIONS)
    return ((centre - middle) / max(float(scale), 1e-9)) @ matrix
