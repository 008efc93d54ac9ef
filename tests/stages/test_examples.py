"""The answers that people look at are those that the score counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metapeft.data.task import Example
from metapeft.peft import adapters
from metapeft.stages.examples import MOST, SHOWN, examples
from metapeft.training.evaluation import predict
from metapeft.training.trainer import run_trial
from tests.backbones.tiny import CONTEXT
from tests.training import made
from tests.training.test_evaluation import easy


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "configuration",
    [{"method": "lora", "rank": 2, "learning_rate": 2e-2}, {"method": "prefix", "tokens": 8, "learning_rate": 0.3}],
)
def test_free_text_is_right_where_it_matches_exactly(
    architecture: str, configuration: dict[str, Any], tmp_path: Path
) -> None:
    session = made.session(architecture, easy())
    run_trial(
        session, configuration, steps=40 if configuration["method"] == "prefix" else 12, folder=tmp_path / "adapter"
    )
    adapter = adapters.load(tmp_path / "adapter", session.model)
    adapter.attach(session.model)
    predictions = predict(session, adapter, "test")
    adapter.detach(session.model)
    assert 0 < predictions.exact[:SHOWN].mean() < 1, "the comparison must see both outcomes"
    before = predict(session, None, "test").exact
    found = examples(session, adapter, predictions)
    assert len(found) == SHOWN < len(session.task.test)
    for row, example in enumerate(session.task.test[:SHOWN]):
        shown = found[row]
        assert shown["text"] == example.prompt and shown["expected"] == example.completion.strip()
        assert shown["right"] == predictions.exact[row] == (shown["tuned"] == shown["expected"])
        assert before[row] == (shown["untuned"] == shown["expected"])
        assert all(len(session.backbone.tokenizer.encode(shown[key])) <= MOST + 1 for key in ("untuned", "tuned"))


def test_a_row_that_fills_the_context_ends(tmp_path: Path) -> None:
    """Virtual tokens before it leave no place for an answer: one token is written, as scoring reads it."""
    task = made.generation(8, 2)
    long = "a" * (CONTEXT - 12)
    session = made.session("llama", replace(task, test=(Example(f"{long} ->", " b"), *task.test)))
    assert session.encoded["test"][0].length + len(session.shared) > CONTEXT - 20
    run_trial(session, {"method": "prefix", "tokens": 20}, steps=1, folder=tmp_path / "adapter", test=False)
    adapter = adapters.load(tmp_path / "adapter", session.model)
    adapter.attach(session.model)
    predictions = predict(session, adapter, "test")
    adapter.detach(session.model)
    found = examples(session, adapter, predictions)
    assert len(found) == 3 and found[0]["tuned"].endswith("…") and len(found[0]["tuned"]) < 10


def test_labels_are_those_of_the_score(tmp_path: Path) -> None:
    session = made.session("llama", made.classification(24, 12))
    run_trial(session, {"method": "lora", "rank": 2, "learning_rate": 2e-2}, steps=6, folder=tmp_path / "adapter")
    adapter = adapters.load(tmp_path / "adapter", session.model)
    adapter.attach(session.model)
    predictions = predict(session, adapter, "test")
    adapter.detach(session.model)
    before = predict(session, None, "test")
    assert predictions.label_scores is not None and before.label_scores is not None
    labels = session.task.labels
    for row, shown in enumerate(examples(session, adapter, predictions)):
        assert shown["tuned"] == labels[predictions.label_scores[row].argmax()]
        assert shown["untuned"] == labels[before.label_scores[row].argmax()]
        assert shown["right"] == (shown["tuned"] == session.task.test[row].completion.strip())
