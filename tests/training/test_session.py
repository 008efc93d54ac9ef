"""What trials share: encoded splits without their common beginning, padding, and completion positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.data.task import Example, Task
from metapeft.errors import UserError
from metapeft.peft import create, parse
from metapeft.runtime import mx, nn
from metapeft.training.encode import Encoded
from metapeft.training.evaluation import evaluate, predict
from metapeft.training.session import Session, Shard, completion_logits, rows_targets
from tests.backbones.tiny import tiny
from tests.training import made


@pytest.fixture(scope="module")
def session() -> Session:
    return made.session()


def token_losses(session: Session, shard: Shard, start: int = 0, whole: bool = False) -> np.ndarray:
    prefix = session.prefix(None, start, whole)
    logits = completion_logits(session.model, prefix, shard, start)
    return np.array(nn.losses.cross_entropy(logits, shard.targets))


def test_the_shared_beginning_is_taken_off_and_comes_back_as_prefix(session: Session) -> None:
    tokenizer = session.backbone.tokenizer
    assert tokenizer.decode(list(session.shared)) == "Many a? "
    for split in ("train", "validation", "test"):
        for example, encoded in zip(session.task.split(split), session.encoded[split], strict=True):
            whole = (*session.shared, *encoded.ids)
            assert tokenizer.decode(list(whole[:-1])) == f"{example.prompt}{example.completion}"
            assert whole[-1] == tokenizer.eos_token_id


def test_losses_equal_those_of_the_plain_model_on_the_whole_text(session: Session) -> None:
    shard = session.shard("train", [0, 1, 2, 3], 0)
    found = token_losses(session, shard)
    expected: list[float] = []
    for encoded in session.encoded["train"][:4]:
        whole = (*session.shared, *encoded.ids)
        logits = session.model(mx.array([whole[:-1]]))[0]
        losses = nn.losses.cross_entropy(logits, mx.array(whole[1:]))
        expected += losses[len(session.shared) + encoded.start - 1 :].tolist()
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("start", [0, 2])
def test_losses_are_the_same_with_the_shared_beginning_in_every_sequence(session: Session, start: int) -> None:
    assert session.whole(1) and session.whole(6) and not session.whole(7), "8 tokens are shared"
    indices = [4, 9, 1]
    if start:
        session.trunk("train", start).prepare(indices, session.workers)
    apart = token_losses(session, session.shard("train", indices, start), start)
    whole = token_losses(session, session.shard("train", indices, start, whole=True), start, whole=True)
    assert np.allclose(apart, whole, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=6, unique=True))
def test_padding_never_changes_a_loss(session: Session, indices: list[int]) -> None:
    """Each example's losses are the same alone and beside longer ones."""
    together = token_losses(session, session.shard("train", indices, 0))
    alone = [token_losses(session, session.shard("train", [i], 0)) for i in indices]
    assert np.allclose(together, np.concatenate(alone), atol=2e-5)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=6))
def test_rows_point_at_the_tokens_before_each_completion_token(sizes: Sequence[tuple[int, int]]) -> None:
    examples = [Encoded(tuple(range(prompt + completion)), prompt) for prompt, completion in sizes]
    longest = max(e.length for e in examples)
    rows, targets, spans = rows_targets(examples, longest)
    padded = np.full((len(examples), longest + 1), -1)
    for row, example in enumerate(examples):
        padded[row, : len(example.ids)] = example.ids
    assert padded[:, :-1].reshape(-1)[rows].tolist() == [target - 1 for target in targets]
    assert padded[:, 1:].reshape(-1)[rows].tolist() == targets
    assert spans == [completion for _, completion in sizes]


def test_sessions_alike_share_the_view_of_the_model_and_compute_the_same() -> None:
    first = made.session()
    task = made.classification(seed=5)
    shared, own = Session(first.backbone, task, first), Session(first.backbone, task)
    assert shared.decoder is first.decoder and (own.decoder is not first.decoder or own.decoder is None)
    assert Session(made.session("qwen2").backbone, task, first).decoder is not first.decoder or first.decoder is None
    assert predict(shared, None, "test").loss_sum.tolist() == predict(own, None, "test").loss_sum.tolist()


def test_virtual_tokens_beyond_a_table_of_positions_are_refused() -> None:
    """There MLX would read whatever lies behind the table."""
    long = tuple(Example("ab" * 22 + ":", f" {'yes' if i % 2 else 'no'}") for i in range(8))
    at = Session(tiny("gpt2"), Task("long", "0" * 16, "classification", "accuracy", long, long, long, ("no", "yes")))
    adapter = create(parse("prefix", {"tokens": 15}), at.model, seed=0, text_ids=[65, 66, 67])
    adapter.attach(at.model)
    assert evaluate(at, adapter, "validation").loss > 0
    adapter.detach(at.model)
    many = create(parse("prefix", {"tokens": 16}), at.model, seed=0, text_ids=[65, 66, 67])
    many.attach(at.model)
    with pytest.raises(UserError, match=r"16 virtual tokens and the longest row .* at most 15"):
        evaluate(at, many, "validation")
