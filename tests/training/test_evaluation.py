"""Scores without generation equal those with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metapeft.backbones.forward import PrefixCache, anatomy, run
from metapeft.data.task import Example, Task
from metapeft.peft import adapters
from metapeft.runtime import mx, nn
from metapeft.training.evaluation import (
    CHUNK_TOKENS,
    Labels,
    Predictions,
    chunked,
    evaluate,
    macro_f1,
    predict,
    proportion_error,
    score,
    untuned,
)
from metapeft.training.trainer import run_trial
from tests.training import made


def easy() -> Task:
    """Every word has the same answer, of several tokens: a few steps learn some of it."""
    task = made.generation(24, 12)
    chance = np.random.default_rng(0)

    def same(examples: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(Example(e.prompt, " ok" if chance.random() < 0.7 else " no") for e in examples)

    return replace(task, train=same(task.train), validation=same(task.validation), test=same(task.test))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_exact_match_is_what_greedy_generation_gives(architecture: str, tmp_path: Path) -> None:
    """With mlx-lm's own generation from the adapted model."""
    from mlx_lm import stream_generate

    session = made.session(architecture, easy())
    run_trial(session, {"method": "lora", "rank": 2, "learning_rate": 2e-2}, steps=12, folder=tmp_path / "adapter")
    adapter = adapters.load(tmp_path / "adapter", session.model)
    adapter.attach(session.model)
    exact = predict(session, adapter, "test").exact
    assert 0 < exact.mean() < 1, "the comparison must see both outcomes"
    tokenizer = session.backbone.tokenizer
    for index, example in enumerate(session.task.test):
        prompt = tokenizer.encode(example.prompt, add_special_tokens=False)
        written = [part.token for part in stream_generate(session.model, tokenizer, prompt, max_tokens=8)]
        wanted = session.encoded["test"][index]
        assert (tuple(written) == wanted.ids[wanted.start :]) == exact[index]
    adapter.detach(session.model)


def test_loss_is_the_mean_over_all_completion_tokens() -> None:
    session = made.session(task=made.generation())
    losses: list[float] = []
    for encoded in session.encoded["test"]:
        whole = (*session.shared, *encoded.ids)
        logits = session.model(mx.array([whole[:-1]]))[0]
        each = nn.losses.cross_entropy(logits, mx.array(whole[1:]))
        losses += each[len(session.shared) + encoded.start - 1 :].tolist()
    assert evaluate(session, None, "test").loss == pytest.approx(float(np.mean(losses)), abs=1e-5)


@pytest.mark.parametrize("method", made.METHODS)
@pytest.mark.parametrize(
    "labels",
    [("no", "yes"), ("ab", "abc", "abd", "x"), ("a", "ab", "abc"), ("red one", "red two", "blue one", "blue two")],
    ids=["different", "nested", "chain", "tree"],
)
def test_label_scores_are_the_likelihood_of_the_deciding_tokens(method: str, labels: tuple[str, ...]) -> None:
    """Brute force: each label's tokens after the prompt, up to the one that no other label shares."""
    session = made.session(task=made.classification(labels=labels, rest=16))
    adapter = made.moved(method, session)
    task, tokenizer = session.task, session.backbone.tokenizer
    assert set(task.labels) == set(labels)
    predictions = predict(session, adapter, "test")
    assert predictions.label_scores is not None
    known = Labels(session)
    spelled = [
        (*tokenizer.encode(f" {label}", add_special_tokens=False), tokenizer.eos_token_id) for label in task.labels
    ]
    assert [tuple(s) for s in known.sequences] == spelled
    virtual = adapter.prefix(session.model)
    for index, encoded in enumerate(session.encoded["test"]):
        prompt = (*session.shared, *encoded.ids[: encoded.start])
        for column, tokens in enumerate(spelled):
            decided = next(
                n for n in range(1, len(tokens) + 1) if sum(other[:n] == tokens[:n] for other in spelled) == 1
            )
            cache = None if virtual is None else [PrefixCache(k, v) for k, v in virtual]
            logits = run(session.model, mx.array([[*prompt, *tokens[: decided - 1]]]), cache=cache)[0]
            logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            expected = sum(logs[len(prompt) - 1 + n, tokens[n]].item() for n in range(decided))
            assert predictions.label_scores[index, column] == pytest.approx(expected, abs=2e-4)
    adapter.detach(session.model)


def test_cached_trunk_gives_the_same_predictions() -> None:
    session = made.session()
    adapter = made.moved("lora", session, layers=2)
    cached = predict(session, adapter, "test")
    adapter.lowest_layer = lambda: 0  # type: ignore[method-assign]
    whole = predict(session, adapter, "test")
    assert np.allclose(cached.loss_sum, whole.loss_sum, atol=1e-4)
    assert np.allclose(cached.label_scores, whole.label_scores, atol=1e-4)
    assert np.array_equal(cached.exact, whole.exact)
    adapter.detach(session.model)


@pytest.mark.parametrize(
    "labels", [("no", "yes"), ("red one", "red two", "blue one", "blue two")], ids=["flat", "tree"]
)
def test_some_examples_are_predicted_as_among_all(labels: tuple[str, ...]) -> None:
    session = made.session(task=made.classification(labels=labels))
    adapter = made.moved("lora", session, layers=2)
    every, some = predict(session, adapter, "test"), predict(session, adapter, "test", [7, 2, 9])
    for name in ("loss_sum", "tokens", "label_scores"):
        assert np.allclose(getattr(every, name)[[7, 2, 9]], getattr(some, name), atol=1e-4)
    assert np.array_equal(every.exact[[7, 2, 9]], some.exact)
    assert evaluate(session, adapter, "test", [7, 2, 9]) == score(session, some, "test", [7, 2, 9])
    adapter.detach(session.model)


def test_untuned_is_scored_once() -> None:
    session = made.session()
    first = untuned(session, "test")
    assert first == evaluate(session, None, "test")
    assert untuned(session, "test") is first


def test_accuracy_counts_the_best_label_and_exact_match_the_whole_completion() -> None:
    session = made.session()
    n = len(session.task.test)
    truth = [session.task.labels.index(e.completion.strip()) for e in session.task.test]
    scores = np.zeros((n, 2))
    scores[np.arange(n), truth] = 1.0
    scores[0] = scores[0, ::-1]
    predictions = Predictions(np.full(n, 3.0), np.full(n, 2.0), np.zeros(n, dtype=bool), scores)
    found = score(session, predictions, "test")
    assert found.metric == "accuracy" and found.value == pytest.approx((n - 1) / n) and found.loss == 1.5
    task = made.generation(rest=n)
    exact = np.arange(n) % 3 == 0
    found = score(made.session(task=task), replace(predictions, exact=exact), "test")
    assert found.metric == "exact_match" and found.value == exact.mean() and found.n == n


def test_macro_f1_equals_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    chance = np.random.default_rng(0)
    truth, chosen = chance.integers(0, 4, 90), chance.integers(0, 5, 90)
    value, error = macro_f1(truth, chosen, 6)
    assert value == pytest.approx(f1_score(truth, chosen, average="macro"))
    assert (value, error) == macro_f1(truth, chosen, 6) and 0.01 < error < 0.15


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_standard_error_is_never_zero_and_near_the_textbook_one(n: int, p: float) -> None:
    error = proportion_error(p, n)
    assert error > 0
    if n >= 100 and 0.2 < p < 0.8:
        assert error == pytest.approx(math.sqrt(p * (1 - p) / n), rel=0.05)


@given(st.lists(st.integers(1, 700), max_size=60))
def test_chunks_are_a_partition_within_bounds(lengths: list[int]) -> None:
    chunks = chunked(lengths)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        sizes = [lengths[i] for i in chunk]
        assert len(chunk) == 1 or (len(chunk) * max(sizes) <= CHUNK_TOKENS and max(sizes) <= 1.25 * min(sizes) + 2)


def test_the_model_is_left_as_it_was() -> None:
    session = made.session()
    parts = anatomy(session.model)
    before = [id(layer) for layer in getattr(parts.body, parts.layers)]
    evaluate(session, None, "test")
    assert [id(layer) for layer in getattr(parts.body, parts.layers)] == before
