"""POST /v1/feedback: whether an answer was right.

The server remembers, in memory, a digest of what it answered lately, so that a caller may give the answer's id and what
would have been right. What is written to disk is the adapter version and the verdict (`metapeft.monitoring.feedback`).
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import Field, model_validator

from metapeft.errors import UserError
from metapeft.monitoring import feedback
from metapeft.serving.openai import Body

if TYPE_CHECKING:
    from metapeft.serving.app import Service

KEPT = 20_000  # answers that are remembered, those of one request each for itself
Text = Annotated[str, Field(max_length=100_000)]


class FeedbackRequest(Body):
    """Either `rating`, or `correct`, which is compared with the answer (spaces at the ends and case do not count).

    id: of the completion or classification, index: which of its answers. Or model and answer, for an answer that this
    server does not remember.
    """

    id: str | None = Field(None, max_length=100)
    index: int = Field(0, ge=0, le=100_000)
    model: str | None = Field(None, max_length=300)
    answer: Text | None = None
    correct: Text | None = None
    rating: Literal["right", "wrong"] | None = None

    @model_validator(mode="after")
    def enough(self) -> FeedbackRequest:
        if (self.rating is None) == (self.correct is None):
            raise ValueError("give either rating or correct")
        if self.id is None and self.model is None:
            raise ValueError("give the answer's id, or the model that answered")
        if self.id is None and self.correct is not None and self.answer is None:
            raise ValueError("correct without an id needs answer, what the model said")
        return self


class Given:
    """Answers given lately: which version gave them, and digests of their texts."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[str, tuple[bytes | None, ...]]] = OrderedDict()
        self._answers = 0
        self._lock = threading.Lock()

    def remember(self, id: str, version: str, texts: Sequence[str | None]) -> None:
        """texts: None where nobody kept it (a stream); then the answer has to be sent with the feedback."""
        with self._lock:
            self._kept[id] = (version, tuple(None if text is None else _digest(text) for text in texts))
            self._answers += len(texts)
            while self._answers > KEPT and len(self._kept) > 1:
                self._answers -= len(self._kept.popitem(last=False)[1][1])

    def verdict(self, asked: FeedbackRequest, resolve: Any) -> tuple[str, feedback.Verdict, str]:
        """The version that answered, whether it was right, and the answer's id. Raises UserError."""
        known = self._kept.get(asked.id or "")
        if known is None and asked.model is None:
            raise UserError(
                f"this server does not remember the answer {asked.id!r} (it keeps the last {KEPT}, in memory);"
                " send model and rating, or model, answer and correct"
            )
        if known is not None and asked.index >= len(known[1]):
            raise UserError(f"{asked.id!r} has no answer {asked.index}; its answers are 0 to {len(known[1]) - 1}")
        version, digests = known if known is not None else (str(resolve(asked.model)), ())
        id = f"{asked.id}/{asked.index}" if asked.id else ""
        if asked.rating is not None:
            return version, asked.rating, id
        if asked.answer is not None:
            said = _digest(asked.answer)
        elif known is not None and (kept := digests[asked.index]) is not None:
            said = kept
        else:
            raise UserError(f"the text of answer {asked.index} of {asked.id!r} is not kept; send answer too, or rating")
        return version, "right" if said == _digest(asked.correct or "") else "wrong", id


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).casefold().encode(), digest_size=16).digest()


def add_route(app: FastAPI, service: Service, known: Any) -> None:
    """The route. known: the dependency that says who calls."""

    def resolve(model: str) -> str:
        version = service.registry.resolve(model)
        return service.engine.name if version is None else version.key

    @app.post("/v1/feedback", tags=["completions"], dependencies=[known])
    async def give(body: FeedbackRequest) -> dict[str, Any]:
        """Whether an answer was right. It is on disk when this returns; texts are not kept."""
        version, verdict, id = await asyncio.to_thread(service.given.verdict, body, resolve)
        await asyncio.to_thread(feedback.record, version, verdict, id, body.answer, body.correct)
        service.metrics.feedback.labels(version, verdict).inc()
        return {"object": "feedback", "model": version, "verdict": verdict}
