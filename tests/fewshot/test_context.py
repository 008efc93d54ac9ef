"""Examples in the context are a prefix that computes what they would in front of the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from metapeft.data import shots
from metapeft.fewshot import context
from metapeft.fewshot.choose import AT, Strategy, fitted
from metapeft.fewshot.measure import answers
from metapeft.fewshot.strategies import strategies, tuned_context
from metapeft.fewshot.train import train
from metapeft.peft import adapters
from metapeft.peft.prefix import Shots
from metapeft.training.evaluation import predict
from metapeft.training.native import usable
from metapeft.training.session import Session
from tests.backbones.tiny import tiny
from tests.training import made


def session(count: int = 6) -> Session:
    task = shots.draw(made.classification(), count, 0)
    return Session(tiny("llama"), task)


def test_the_prefix_is_the_examples_before_the_prompt() -> None:
    at = session()
    tokens = context.demonstrations(at)
    adapter = context.prefix(at, tokens)
    adapter.attach(at.model)
    found = predict(at, adapter, "test")
    adapter.detach(at.model)
    # The same tokens really in front of every test prompt, with nothing attached.
    before = Session(tiny("llama"), at.task)
    shared, before.shared = before.shared, ()
    before.encoded = {
        name: [e.behind(shared).behind(tokens) for e in examples] for name, examples in before.encoded.items()
    }
    expected = predict(before, None, "test")
    np.testing.assert_allclose(found.loss_sum, expected.loss_sum, rtol=1e-4, atol=1e-4)
    assert (found.exact == expected.exact).all()


def test_as_many_examples_as_fit() -> None:
    at = session(12)
    every = context.demonstrations(at)
    lengths = [len(at.shared) + len(e.ids) + 1 for e in at.encoded["train"]]
    assert len(every) == sum(lengths)
    assert every[-lengths[0] :][: len(at.shared)] == list(at.shared), "the first example stands next to the question"
    for budget in (0, lengths[0], lengths[0] + 1, sum(lengths[:5]), 10**6):
        found = context.demonstrations(at, budget)
        assert len(found) == max((s for s in np.cumsum([0, *lengths]) if s <= budget), default=0)
    longest = max(len(e.ids) for examples in at.encoded.values() for e in examples) + len(at.shared)
    at.backbone = replace(at.backbone, context_length=longest + lengths[0] + 1)
    assert len(context.demonstrations(at)) == lengths[0], "the question needs its place too"


def test_examples_that_are_too_long_are_passed_over() -> None:
    at = session(4)
    long = max(range(4), key=lambda i: at.encoded["train"][i].length)
    lengths = [len(at.shared) + len(e.ids) + 1 for e in at.encoded["train"]]
    at.encoded["train"] = [at.encoded["train"][long], *at.encoded["train"]]
    shown = context.demonstrations(at, max(lengths) - 1)
    assert shown == context.demonstrations(Session(at.backbone, at.task, at), max(lengths) - 1)


def test_where_no_example_fits_the_context_is_not_offered_and_answers_as_the_untuned() -> None:
    at = session(4)
    assert "context" in [way.name for way in strategies(at, [], {})]
    longest = max(len(e.ids) for examples in at.encoded.values() for e in examples) + len(at.shared)
    at.backbone = replace(at.backbone, context_length=longest + 1)
    assert context.demonstrations(at) == []
    assert "context" not in [way.name for way in strategies(at, [], {})]
    found = fitted(Strategy("context", context=True), at, range(4), AT, lambda s, a: answers(s, a, "train"))
    np.testing.assert_array_equal(found[0].loss, answers(at, None, "train").loss)


@pytest.mark.parametrize("native", [True, False])
def test_a_step_does_not_touch_the_tokens_of_the_example_that_it_learns_from(native: bool, monkeypatch: Any) -> None:
    at = session(4)
    first = context.prefix(at, context.demonstrations(at))
    first.attach(at.model)
    assert usable(at, first) is not None
    if not native:
        monkeypatch.setattr("metapeft.training.native.usable", lambda *_: None)
    start = adapters.take(first, {})
    owners = np.array(context.owners(at))
    seen: dict[int, np.ndarray] = {}
    train(
        at, tuned_context(4), lambda step, a: seen.__setitem__(step, np.array(a.module())),
        steps=4, at=[0, 1, 2, 3, 4], start=start, owners=owners.tolist(),
    )  # fmt: skip
    assert len(owners) == len(seen[0]) and sorted(set(owners)) == [0, 1, 2, 3]
    still = (seen[0] == seen[1]).all(axis=1)  # in the first step: Adam goes on moving what it has moved once
    (learned,) = set(owners[still].tolist())
    np.testing.assert_array_equal(still, owners == learned)
    assert (seen[4] != seen[0]).any(axis=1).all(), "in the end every example was taught by the others"


def test_what_is_learned_from_is_left_out_unless_nothing_else_is_there() -> None:
    at = session(4)
    adapter = context.prefix(at, context.demonstrations(at))
    adapter.module = Shots(adapter.module(), context.owners(at))
    owners = np.array(context.owners(at))
    every = np.array(adapter.module())
    with adapter.learning_from([0, 2]):
        np.testing.assert_array_equal(np.array(adapter.module()), every[np.isin(owners, [1, 3])])
    with adapter.learning_from(range(4)):
        assert adapter.module().shape[0] == len(owners)
    np.testing.assert_array_equal(np.array(adapter.module()), every)


def test_a_tuned_context_is_offered_from_three_shots_and_starts_from_the_context() -> None:
    assert "tuned context" not in [way.name for way in strategies(session(2), [], {})]
    at = session(6)
    way = next(way for way in strategies(at, [], {}) if way.name == "tuned context")
    still = replace(way, configuration=way.configuration | {"learning_rate": 1e-12})  # type: ignore[operator]
    (untrained,) = fitted(
        Strategy("context", context=True), at, range(6), AT, lambda s, a: answers(s, a, "test")
    ).values()
    found = fitted(still, at, range(6), (2,), lambda s, a: answers(s, a, "test"))
    np.testing.assert_allclose(found[2].loss, untrained.loss, rtol=1e-4, atol=1e-4)


def test_a_long_example_takes_the_room_of_no_other() -> None:
    first, *others = made.classification(train=4, longest=6).train
    long = replace(first, prompt="Many a? " + "b" * 60 + ":")
    task = replace(made.classification(), train=(first, long, *others), validation=(), test=())
    at = Session(tiny("llama"), task)
    lengths = {number: len(tokens) for number, tokens in context.shown(at)}
    room = lengths[1] + 1  # it fits alone
    assert sum(lengths.values()) - lengths[1] <= room < lengths[0] + lengths[1]
    assert sorted(number for number, _ in context.shown(at, room)) == [0, 2, 3, 4]
