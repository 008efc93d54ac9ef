"""Rows of the test split as people want to see them: the text, the right answer, and the answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metapeft.runtime import mx

if TYPE_CHECKING:
    from metapeft.peft.base import Adapter
    from metapeft.training.evaluation import Predictions
    from metapeft.training.session import Session

SHOWN = 10  # the first of the split: chosen by nobody
ROOM, MOST = 8, 128  # tokens: what an answer may have more than twice the right one; and in all


def examples(session: Session, adapter: Adapter, predictions: Predictions) -> list[dict[str, Any]]:
    """By row: text, expected, untuned and tuned answer, and whether that is right.

    Labels are weighed as in the score (`predictions`: the adapter's, of the whole split), free text is written word for
    word. The adapter must be detached.
    """
    from metapeft.data import templates
    from metapeft.training.evaluation import predict

    task = session.task
    shown = range(min(SHOWN, len(task.test)))
    if task.kind == "classification":
        before, after = predict(session, None, "test", shown), predictions.at(shown)
        untuned, tuned = ([task.labels[best] for best in _best(found)] for found in (before, after))
        right = [answer == task.test[row].completion.strip() for row, answer in zip(shown, tuned, strict=True)]
    else:
        untuned = _written(session, None, shown)
        adapter.attach(session.model)
        try:
            tuned = _written(session, adapter, shown)
        finally:
            adapter.detach(session.model)
        right = [bool(predictions.exact[row]) for row in shown]
    return [
        {
            "text": templates.text(task.test[row], task.template, task.labels),
            "expected": task.test[row].completion.strip(),
            "untuned": untuned[row],
            "tuned": tuned[row],
            "right": right[row],
        }
        for row in shown
    ]


def _best(found: Predictions) -> list[int]:
    assert found.label_scores is not None
    return [int(scores.argmax()) for scores in found.label_scores]


def _written(session: Session, adapter: Adapter | None, rows: Sequence[int]) -> list[str]:
    """The most likely text after each prompt of the test split, "…" where the limit in tokens ends it."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = session.model, session.backbone.tokenizer
    virtual = (adapter.prefix(model) if adapter is not None else None) or []
    found = []
    for row in rows:
        example = session.encoded["test"][row]
        prompt = [*session.shared, *example.ids[: example.start]]
        left = session.backbone.context_length - len(prompt) - (virtual[0][0].shape[2] if virtual else 0)
        limit = max(1, min(MOST, left, 2 * (len(example.ids) - example.start) + ROOM))
        cache = make_prompt_cache(model)
        for layer, (keys, values) in zip(cache, virtual):  # noqa: B905 - most methods have no virtual tokens
            layer.update_and_fetch(keys, values)
        ids: list[int] = []
        ended = False
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=limit, prompt_cache=cache):
            if ended := int(token) in tokenizer.eos_token_ids:
                break
            ids.append(int(token))
        found.append(tokenizer.decode(ids).strip() + ("" if ended else "…"))
    return found
