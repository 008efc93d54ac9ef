"""The bodies of the OpenAI-compatible endpoints, and how requests become tokens.

Follows the API reference for chat completions, completions and models. What would change an answer and is not done
here (tools, response formats, penalties) is refused, never ignored. Temperature is 0 where none is given: adapters are
trained and scored for their most likely answer.

An adapter is asked as it was trained: one that was trained on rows of text gets a chat's user message through its own
prompt template, one that was trained on conversations through the backbone's chat template.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from metapeft.data.rows import Row as DataRow
from metapeft.data.task import separator
from metapeft.data.templates import render
from metapeft.errors import UserError
from metapeft.serving.generate import Sampling, Token
from metapeft.training.encode import prompt_ids

# What would change an answer, and the values of it that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "logit_bias", "suffix", "audio"), ()),
    **dict.fromkeys(("tool_choice", "function_call"), ("none",)),
    "modalities": (["text"],),
    "repetition_penalty": (1,),
    "top_k": (-1,),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p"), ()),
}
ROLES = Literal["system", "developer", "user", "assistant"]
TextPart = dict[str, Any]


class Body(BaseModel):
    """What other clients send and has no influence on the answer is let through."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def whole_characters(cls, values: Any) -> Any:
        try:
            json.dumps(values, ensure_ascii=False, default=str).encode()
        except (UnicodeEncodeError, RecursionError):  # half of a surrogate pair: no tokenizer, file or answer takes it
            raise ValueError("the body holds what is not valid Unicode, or is nested too deep") from None
        return values


class Message(Body):
    role: ROLES
    content: str | list[TextPart]

    @field_validator("content")
    @classmethod
    def text_only(cls, value: str | list[TextPart]) -> str:
        if isinstance(value, str):
            return value
        texts = [part.get("text") for part in value if part.get("type") == "text"]
        if len(texts) != len(value) or not all(isinstance(text, str) for text in texts):
            raise ValueError("only text content is understood")
        return "".join(str(text) for text in texts)


class StreamOptions(Body):
    include_usage: bool = False


class Generate(Body):
    """What both kinds of completion share."""

    model: Annotated[str, Field(max_length=300)]
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=8)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def nothing_unsupported(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, harmless in UNSUPPORTED.items():
                if values.get(name) and values[name] not in harmless:
                    raise ValueError(f"{name} is not supported")
            form = values.get("response_format")
            if form is not None and form != {"type": "text"}:
                raise ValueError("response_format is not supported")
        return values

    @field_validator("stream", mode="before")
    @classmethod
    def not_streamed(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("stop")
    @classmethod
    def few_stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or any(not 0 < len(stop) <= 200 for stop in stops):
            raise ValueError("stop: up to 4 strings of up to 200 characters")
        return stops

    def sampling(self, place: int, logprobs: int | None) -> Sampling:
        """How the `place`-th of the n answers is drawn."""
        seed = None if self.seed is None else (self.seed + place) % 2**63
        top_p = 1.0 if self.top_p is None else max(self.top_p, 1e-9)  # of 0 the likeliest token is left
        return Sampling(self.temperature or 0.0, top_p, seed, logprobs)


class ChatRequest(Generate):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generate):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class ClassifyRequest(Body):
    """labels and template: only for models that do not say them themselves."""

    model: Annotated[str, Field(max_length=300)]
    input: str | Annotated[list[str], Field(min_length=1, max_length=256)]
    labels: Annotated[list[str], Field(min_length=2, max_length=200)] | None = None
    template: str | None = Field(None, max_length=10_000)


def chat_prompt(request: ChatRequest, form: dict[str, Any], tokenizer: Any) -> tuple[list[int], str]:
    """The prompt's tokens, and what separates it from the answer. Raises UserError without a usable chat template."""
    messages = [(m.role if m.role != "developer" else "system", str(m.content)) for m in request.messages]
    if form.get("template") and len(messages) == 1 and messages[0][0] == "user":
        prompt = render(DataRow(messages[0][1], ""), form["template"], form.get("labels") or ()).prompt
        return prompt_ids(prompt, tokenizer), separator(prompt)
    if not getattr(tokenizer, "has_chat_template", True):
        raise UserError("the backbone has no chat template; use /v1/completions")
    return prompt_ids(tuple(messages), tokenizer), ""


def plain_prompts(request: CompletionRequest, tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """Token lists, one per prompt. Raises UserError for token ids that do not exist."""
    given: Sequence[Any] = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if given and isinstance(given[0], int):
        given = [given]
    if not 1 <= len(given) <= 64:
        raise UserError("prompt: give between 1 and 64 prompts")
    found = [prompt_ids(p, tokenizer) if isinstance(p, str) else [int(id) for id in p] for p in given]
    if any(not 0 <= id < vocabulary for ids in found for id in ids):
        raise UserError(f"prompt: token ids go from 0 to {vocabulary - 1}")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [ids or [start] for ids in found]


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What every answer, and every chunk of one, begins with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt_tokens: int, written: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }


def token_text(id: int, tokenizer: Any) -> str:
    """One token as text; part of a character is shown as the vocabulary writes it, so that tokens differ."""
    text = str(tokenizer.decode([id]))
    return str(tokenizer.convert_ids_to_tokens(id)) if "\ufffd" in text or not text else text


def token_bytes(id: int, tokenizer: Any) -> bytes:
    """What a token adds to the text in UTF-8, also where it is a part of a character: then from the vocabulary, which
    writes bytes as GPT-2 does (one letter each) or as <0x..>."""
    text = str(tokenizer.decode([id]))
    if "\ufffd" not in text:
        return text.encode()
    token = str(tokenizer.convert_ids_to_tokens(id))
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    letters = _letters()
    return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else text.encode()


@cache
def _letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def chat_logprobs(tokens: Sequence[Token], tokenizer: Any) -> dict[str, Any]:
    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": token_text(id, tokenizer), "logprob": logprob, "bytes": list(token_bytes(id, tokenizer))}

    content = [
        entry(t.id, t.logprob) | {"top_logprobs": [entry(id, value) for id, value in t.alternatives]} for t in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Token], tokenizer: Any, offset: int) -> dict[str, Any]:
    """offset: characters of this answer that were sent before."""
    texts = [token_text(t.id, tokenizer) for t in tokens]
    parts = [token_bytes(t.id, tokenizer) for t in tokens]
    offsets = [offset + len(b"".join(parts[:i]).decode(errors="ignore")) for i in range(len(parts))]
    top = [{token_text(id, tokenizer): value for id, value in t.alternatives} for t in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def failure(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
