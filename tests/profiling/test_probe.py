"""The probe's one pass agrees with the trainer's own evaluation and with a model run example by example."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from metapeft.backbones import Backbone
from metapeft.backbones.forward import anatomy, run
from metapeft.data.task import Example, Task
from metapeft.errors import UserError
from metapeft.profiling import probe as module
from metapeft.profiling.probe import _forward, linear_probe, neighbour_disagreement, probe
from metapeft.runtime import mx
from metapeft.training.encode import encode
from metapeft.training.evaluation import predict
from metapeft.training.session import Session
from tests.backbones.tiny import CONTEXT, tiny
from tests.profiling.tasks import chat, classification, generation

SHARED = ("ham", "ham and eggs", "spam", "sparse")  # several begin with the same tokens


@pytest.fixture(scope="module")
def llama() -> Backbone:
    return tiny("llama")


@pytest.mark.parametrize("task", [classification(40), classification(40, labels=SHARED), generation(), chat()])
def test_the_same_numbers_as_evaluation(llama: Backbone, task: Task) -> None:
    session = Session(llama, task)
    ours, states = _forward(session, "validation")
    theirs = predict(session, None, "validation")
    np.testing.assert_allclose(ours.loss_sum, theirs.loss_sum, rtol=1e-4)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.exact, theirs.exact)
    if ours.label_scores is None:
        assert theirs.label_scores is None
    else:
        np.testing.assert_allclose(ours.label_scores, theirs.label_scores, rtol=1e-3, atol=1e-3)
    assert states.shape == (len(task.validation), 64) and np.isfinite(states).all()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3_moe"])
def test_states_are_means_over_what_differs_in_the_prompt(architecture: str) -> None:
    backbone = tiny(architecture)
    session = Session(backbone, classification(40))
    _, states = _forward(session, "validation")
    parts = anatomy(backbone.model)
    encoded = [encode(example, backbone.tokenizer) for example in session.task.validation]
    prompts = [e.ids[: e.start] for e in encoded]
    first = next(i for i in range(999) if len({p[i] for p in prompts}) > 1)
    last = next(i for i in range(999) if len({p[-1 - i] for p in prompts}) > 1)
    for index in (0, 3):
        ids = mx.array([prompts[index]])
        hidden = getattr(parts.body, parts.norm)(run(backbone.model, ids, logits=False))[0]
        expected = np.array(hidden[first : ids.shape[1] - last].astype(mx.float32).mean(axis=0))
        np.testing.assert_allclose(states[index], expected, rtol=1e-3, atol=1e-4)


def test_every_label_is_known_to_the_scorer_even_if_no_probed_row_has_it(llama: Backbone) -> None:
    task = classification(200)
    rare = replace(task.train[0], completion=" rare")
    task = replace(task, train=(*task.train, rare), labels=("ham", "rare", "spam"), version="r" * 16)
    found = probe(task, llama)
    assert found.zero_shot.n == len(found.labels) == min(len(task.train), module.EXAMPLES)
    assert found.zero_shot.metric == "accuracy"


def test_long_rows_bound_the_number_of_examples(llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS", 500)
    monkeypatch.setattr(module, "LEAST", 5)
    found = probe(classification(100), llama)
    assert 5 <= len(found.labels) < 12
    monkeypatch.setattr(module, "LEAST", 20)
    assert len(probe(classification(100), llama).labels) == 20


def test_a_linear_probe_finds_what_is_linear_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    noise = random.normal(size=(120, 40))
    clear = noise + 4 * np.eye(3)[labels] @ random.normal(size=(3, 40))
    assert linear_probe(clear, labels) > 0.95 and neighbour_disagreement(clear, labels) < 0.05
    assert linear_probe(noise, labels) < 0.55 and neighbour_disagreement(noise, labels) > 0.4
    assert linear_probe(clear, labels) == linear_probe(clear, labels)


def test_labels_seen_once_do_not_break_the_probe() -> None:
    states = np.random.default_rng(0).normal(size=(10, 5))
    assert linear_probe(states, np.arange(10)) == 0
    assert linear_probe(states, np.array([0] * 9 + [1])) == 0
    assert 0 <= linear_probe(states, np.array([0, 0, 1, 1, 2, 3, 4, 5, 6, 7])) <= 0.4
    assert 0 <= neighbour_disagreement(states[:2], np.array([0, 1])) <= 1


def test_tasks_of_one_domain_lie_closer_than_others(smollm: Backbone) -> None:
    spam, more, sums = (probe(t, smollm).domain for t in (classification(12), classification(12, 1), generation(12)))
    assert np.linalg.norm(spam - more) < 0.5 * np.linalg.norm(spam - sums)


def test_of_rows_that_are_too_long_the_tasks_are_counted(llama: Backbone) -> None:
    task = classification(40)
    rows = tuple(Example("word " * CONTEXT + str(e.prompt), e.completion) for e in task.train)
    with pytest.raises(UserError, match=rf"{len(rows)} rows are longer .*first: train row 1,"):
        probe(replace(task, train=rows), llama)
    with pytest.raises(UserError, match=r"1 rows are longer .*first: train row 8,"):
        probe(replace(task, train=(*task.train[:7], rows[7], *task.train[8:])), llama)
