"""The HTTP service: routes, who may call them, how much, and what is told about it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import math
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, model_validator
from starlette.exceptions import HTTPException

from metapeft.data.rows import Row as DataRow
from metapeft.data.task import separator
from metapeft.data.templates import check_template, render
from metapeft.errors import UserError
from metapeft.files import finite
from metapeft.serving import feedback, openai
from metapeft.serving.engine import Busy, Classification, Engine, Generation, Piece, TooSlow, Unavailable
from metapeft.serving.keys import Key, Keyring
from metapeft.serving.metrics import Metrics
from metapeft.serving.openai import Body, ChatRequest, ClassifyRequest, CompletionRequest
from metapeft.serving.overview import overview
from metapeft.serving.registry import Registry, UnknownModel, Version, out_of_reach
from metapeft.serving.score import Answers
from metapeft.serving.select import AGAIN, Job, Selector
from metapeft.settings import Prefer, brief
from metapeft.training.encode import prompt_ids

PAGE = Path(__file__).parent / "page"
DEFAULT_TOKENS = 256  # written where the request says nothing
LABEL_TOKENS = 64  # that a label may have
OWN = Key("", "this machine", "", "", admin=True)  # whoever shows the token in METAPEFT_HOME/servers
SELECTIONS = 8  # made at the same time; each takes seconds
STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Bounds:
    """What one request may take."""

    body_bytes: int = 4 * 2**20
    rows_bytes: int = 16 * 2**20  # of /v1/select, which takes whole tasks
    receive_seconds: float = 30.0  # until the whole body is here
    seconds: float = 300.0  # until the answer is written


@dataclass
class Service:
    """Everything that the routes use. local: it listens on this machine only. token: of METAPEFT_HOME/servers."""

    engine: Engine
    registry: Registry
    selector: Selector
    keyring: Keyring
    metrics: Metrics
    log: Callable[[dict[str, Any]], None]
    local: bool = True
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    bounds: Bounds = Bounds()
    given: feedback.Given = field(default_factory=feedback.Given)


class SelectRequest(Body):
    """A task of the catalog by its name, or rows: text and label, prompt and completion, or messages."""

    task: str | None = Field(None, max_length=200)
    rows: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=100_000)] | None = None
    name: str | None = Field(None, max_length=60)
    prefer: Prefer | None = None
    max_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_memory_mb: float | None = Field(None, gt=0, allow_inf_nan=False)
    wait: float = Field(0.0, ge=0, le=60, description="seconds to wait for a task that must be measured first")

    @model_validator(mode="after")
    def one_of_both(self) -> SelectRequest:
        if (self.task is None) == (self.rows is None):
            raise ValueError("give either task or rows")
        return self


class DeployRequest(Body):
    model: str | None = Field(None, max_length=300)


class Problem(BaseModel):
    """What went wrong, as OpenAI's API says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    error: Problem


# Of every route: what is wrong with a request (4XX; never 422, which FastAPI would promise), what is wrong here (5XX).
FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request cannot be answered; the message says why"},
    "5XX": {"model": Failure, "description": "The server cannot answer now"},
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; server-sent events with stream", "content": {"text/event-stream": {}}}
}


class TooMany(Busy):
    """The key's own rate is used up."""


def known_by(service: Service, authorization: str) -> Key | None:
    """The key that an Authorization header shows; None where none is needed. Raises HTTPException; Unavailable where
    the keys cannot be read."""
    scheme, _, text = authorization.partition(" ")
    given = text.strip() if scheme.lower() == "bearer" else ""
    if given and hmac.compare_digest(given.encode(), service.token.encode()):
        return OWN
    try:
        if not service.keyring.needed and service.local:
            return None
        key = service.keyring.find(given) if given else None
    except UserError as error:
        raise Unavailable("the server cannot read its keys now") from error
    if key is None:
        raise HTTPException(401, "a valid key is needed: Authorization: Bearer mp-…", {"WWW-Authenticate": "Bearer"})
    return key


def create_app(service: Service) -> FastAPI:
    """The service as an ASGI application. What it uses is started and stopped by its caller (see `serve`)."""
    engine, registry = service.engine, service.registry
    backbone = engine.backbone
    app = FastAPI(
        title="metapeft",
        version=installed("metapeft"),
        summary="One backbone, many adapters, and advice on how to make the next one",
        docs_url=None,
        redoc_url=None,
        responses=FAILURES,
    )
    vocabulary = backbone.tokenizer.get_vocab()  # with added tokens, which `vocab_size` leaves out
    longest_token = max(map(len, vocabulary))
    reading = ThreadPoolExecutor(1, "metapeft-tokenizing")
    selecting = ThreadPoolExecutor(SELECTIONS, "metapeft-selecting")  # of their own: nothing else waits for them
    page, docs = ((PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "docs.html"))

    def caller(request: Request) -> Key | None:
        """The key of a request; None where none is needed. Raises HTTPException, and TooMany."""
        key = known_by(service, request.headers.get("authorization", ""))
        if key is not None and key.id:
            request.state.key = key.id
            wait = service.keyring.spend(key)
            if wait:
                raise TooMany(wait)
        return key

    known = Depends(caller)

    def administrator(key: Key | None = known) -> None:
        if key is not None and not key.admin:
            raise HTTPException(403, "this key may not administer")

    @app.get("/healthz", tags=["operation"], summary="The process lives and its engine runs")
    def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok" if engine.alive else "dead"}, 200 if engine.alive else 503)

    @app.get("/readyz", tags=["operation"], summary="Requests can be answered")
    def readyz() -> JSONResponse:
        ready = engine.alive and registry.ready.is_set()
        return JSONResponse({"status": "ready" if ready else "starting"}, 200 if ready else 503)

    @app.get(
        "/metrics",
        tags=["operation"],
        summary="For Prometheus",
        dependencies=[known],
        response_class=PlainTextResponse,
    )
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    def documentation() -> HTMLResponse:
        return HTMLResponse(docs, headers=PAGE_HEADERS)

    @app.get("/v1/models", tags=["models"], summary="The backbone and its adapters", dependencies=[known])
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [own(), *(described(id, model) for id, model in registry.ids())]}

    @app.get("/v1/models/{id:path}", tags=["models"], summary="One model", dependencies=[known])
    def model(id: str) -> dict[str, Any]:
        if id == engine.name:
            return own()
        found = registry.find(id)
        assert found is not None
        return described(id, found)

    @app.post("/v1/deploy", tags=["models"], status_code=202, dependencies=[Depends(administrator)])
    def deploy(body: DeployRequest) -> dict[str, str]:
        """Look at the registry now. What comes of it is told by /v1/deployments."""
        registry.notice(body.model)
        return {"status": "noticed"}

    @app.get("/v1/deployments", tags=["models"], summary="Deployments, latest first", dependencies=[known])
    def deployments() -> dict[str, Any]:
        done = [asdict(deployment) for deployment in reversed(list(registry.deployments))]
        return {"object": "list", "data": done, "problem": registry.problem}

    @app.get("/v1/overview", tags=["selection"], summary="What the page shows", dependencies=[known])
    def view() -> dict[str, Any]:
        try:
            return overview(service.engine, registry, service.selector)
        except UserError as error:  # nothing was asked that could be wrong
            raise Unavailable("the overview cannot be made now") from error

    @app.post("/v1/chat/completions", tags=["completions"], dependencies=[known], responses=ANSWERS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions. model: an id of /v1/models."""
        version = await resolved(body.model)
        form = version.form if version is not None else {}
        readable([sum(len(str(message.content)) for message in body.messages)])
        ids, skip = await tokenized(openai.chat_prompt, body, form, backbone.tokenizer)
        limits = [room(len(ids), body.max_completion_tokens or body.max_tokens, version)]
        events: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        jobs = start(body, version, [ids], limits, body.alternatives, events)
        note(request, body.model, len(ids))
        if not body.stream:
            pieces = await everything(request, jobs, events)
            choices = [
                {
                    "index": n,
                    "message": {"role": "assistant", "content": piece.text.removeprefix(skip), "refusal": None},
                    "logprobs": openai.chat_logprobs(piece.tokens, backbone.tokenizer) if body.logprobs else None,
                    "finish_reason": piece.finished,
                }
                for n, piece in enumerate(pieces)
            ]
            written = sum(written_by(job) for job in jobs)
            request.state.written = written
            service.metrics.tokens.labels(label(version)).inc(written)
            record = openai.head("chat.completion", "chatcmpl", body.model)
            service.given.remember(record["id"], label(version), [piece.text.removeprefix(skip) for piece in pieces])
            return JSONResponse({**record, "choices": choices, "usage": openai.usage(len(ids), written)})
        record = openai.head("chat.completion.chunk", "chatcmpl", body.model)
        first = set(range(len(jobs)))

        def chunk(n: int, piece: Piece) -> list[dict[str, Any]]:
            text, choices = piece.text, []
            if n in first:
                first.discard(n)
                text = text.removeprefix(skip)
                choices.append({"index": n, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            logs = openai.chat_logprobs(piece.tokens, backbone.tokenizer) if body.logprobs else None
            if text or logs:
                choices.append({"index": n, "delta": {"content": text}, "logprobs": logs, "finish_reason": None})
            if piece.finished:
                choices.append({"index": n, "delta": {}, "finish_reason": piece.finished})
            return choices

        return await streamed(request, body, version, record, jobs, events, chunk, len(ids))

    @app.post("/v1/completions", tags=["completions"], dependencies=[known], responses=ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """OpenAI's completions: the prompt as it is, without any template."""
        version = await resolved(body.model)
        readable(
            len(text)
            for text in ([body.prompt] if isinstance(body.prompt, str) else body.prompt)
            if isinstance(text, str)
        )
        prompts = await tokenized(openai.plain_prompts, body, backbone.tokenizer, len(vocabulary))
        limits = [room(len(ids), body.max_tokens, version) for ids in prompts]
        events: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        jobs = start(body, version, prompts, limits, body.logprobs, events)
        prompt_tokens = sum(map(len, prompts))
        note(request, body.model, prompt_tokens)
        record = openai.head("text_completion", "cmpl", body.model)
        sent = [0] * len(jobs)

        def choice(n: int, piece: Piece) -> dict[str, Any]:
            logs = None
            if body.logprobs is not None:
                logs = openai.completion_logprobs(piece.tokens, backbone.tokenizer, sent[n])
                sent[n] += len(piece.text)
            return {"index": n, "text": piece.text, "logprobs": logs, "finish_reason": piece.finished}

        if body.stream:
            return await streamed(
                request, body, version, record, jobs, events, lambda n, piece: [choice(n, piece)], prompt_tokens
            )
        pieces = await everything(request, jobs, events)
        written = sum(written_by(job) for job in jobs)
        request.state.written = written
        service.metrics.tokens.labels(label(version)).inc(written)
        choices = [choice(n, piece) for n, piece in enumerate(pieces)]
        service.given.remember(record["id"], label(version), [piece.text for piece in pieces])
        return JSONResponse({**record, "choices": choices, "usage": openai.usage(prompt_tokens, written)})

    @app.post("/v1/classify", tags=["completions"], dependencies=[known])
    async def classify(body: ClassifyRequest, request: Request) -> dict[str, Any]:
        """The label of each text, with the probability of every label: the likelihoods that the score is made of."""
        version = await resolved(body.model)
        form = version.form if version is not None else {}
        labels = body.labels or form.get("labels") or []
        template = check_template(body.template or form.get("template") or "{text}\nLabel:")
        if len(labels) < 2:
            raise UserError(f"{body.model} says no labels; give labels (and the prompt template it was trained with)")
        if len(set(labels)) < len(labels):
            raise UserError("labels: every label once")
        texts = [body.input] if isinstance(body.input, str) else body.input
        rendered = [render(DataRow(text, ""), template, labels).prompt for text in texts]
        readable(map(len, texts))
        prompts = await tokenized(lambda: [prompt_ids(prompt, backbone.tokenizer) for prompt in rendered])
        end = backbone.tokenizer.eos_token_id
        space = separator(rendered[0])
        named = [backbone.tokenizer.encode(space + name, add_special_tokens=False) for name in labels]
        if (longest := max(map(len, named))) > LABEL_TOKENS:
            raise UserError(f"labels: one has {longest} tokens; up to {LABEL_TOKENS} are read")
        answers = Answers.of([(*ids, end) for ids in named])
        for n, ids in enumerate(prompts):
            if not ids:
                raise UserError(f"input {n}: with this template nothing is left of it to read; give a text")
            room(len(ids), answers.longest + 1, version)
        events: asyncio.Queue[list[np.ndarray] | Exception] = asyncio.Queue()
        deadline = time.monotonic() + service.bounds.seconds
        virtual = version.virtual if version is not None else 0
        job = Classification(version, prompts, answers, threadsafe(events), deadline, virtual)
        engine.submit(job)
        note(request, body.model, sum(map(len, prompts)))
        scores = await first_of(request, events, [job])
        data = []
        for n, logs in enumerate(scores):
            odds = np.exp(logs - logs.max())
            chances = odds / odds.sum()
            data.append(
                {
                    "index": n,
                    "label": labels[int(chances.argmax())],
                    "probs": [round(float(p), 6) for p in chances],
                    "num_classes": len(labels),
                    "probabilities": {name: round(float(p), 6) for name, p in zip(labels, chances, strict=True)},
                }
            )
        record = openai.head("list", "classify", body.model)
        service.given.remember(record["id"], label(version), [str(row["label"]) for row in data])
        return {
            **record,
            "data": data,
            "usage": openai.usage(sum(map(len, prompts)), 0),
        }

    feedback.add_route(app, service, known)

    @app.post(
        "/v1/select",
        tags=["selection"],
        dependencies=[known],
        responses={202: {"description": "The task is being measured: ask /v1/select/ID"}},
    )
    async def select(body: SelectRequest) -> JSONResponse:
        """What `metapeft recommend` says of a task: at once when it was measured before, else after its measurement."""
        asked = body.model_dump(exclude={"wait"}, exclude_none=True)
        loop = asyncio.get_running_loop()
        job: Job | None = await loop.run_in_executor(selecting, service.selector.ask, asked)
        until = time.monotonic() + body.wait
        while job and job.state in ("queued", "running") and time.monotonic() < until:
            await asyncio.sleep(0.1)
            job = await asyncio.to_thread(service.selector.get, job.id)
        return answer(job)

    @app.get("/v1/select/{id}", tags=["selection"], dependencies=[known], summary="A selection that takes long")
    async def selected(id: str) -> JSONResponse:
        return answer(await asyncio.to_thread(service.selector.get, id))

    def answer(job: Job | None) -> JSONResponse:
        if job is None:
            raise HTTPException(404, "there is no such selection")
        if job.state == "failed":
            if job.input_error:
                raise UserError(job.error)
            again = {
                "Retry-After": str(math.ceil(AGAIN))
            }  # the network or the disk, perhaps; it is measured again then
            raise HTTPException(503, f"the task could not be measured: {job.error}", again)
        code = 200 if job.state == "done" else 202
        headers = {} if code == 200 else {"Location": f"/v1/select/{job.id}", "Retry-After": "2"}
        return JSONResponse(finite(job.to_json()), code, headers)

    def own() -> dict[str, Any]:
        return {"id": engine.name, "object": "model", "created": 0, "owned_by": "metapeft", "method": None}

    def described(id: str, model: Any) -> dict[str, Any]:
        return {
            "id": id,
            "object": "model",
            "created": model.created // 1000,
            "owned_by": "metapeft",
            "parent": engine.name,
            "root": f"{model.name}@{model.version}",
            "task": model.task,
            "version": model.version,
            "method": model.method,
            "metric": model.metric,
            "score": model.score if math.isfinite(model.score) else None,
            "standard_error": model.standard_error if math.isfinite(model.standard_error) else None,
            "untuned_score": model.untuned_score,
        }

    async def resolved(id: str) -> Version | None:
        if not registry.ready.is_set():
            raise Busy(2.0)
        model = registry.find(id)
        if model is None:
            return None
        return registry.known(model) or await asyncio.to_thread(registry.fetch, model)

    async def tokenized(read: Callable[..., Any], *arguments: Any) -> Any:
        """What `read` makes of a request's texts, beside the event loop: of long ones it takes seconds."""
        return await asyncio.get_running_loop().run_in_executor(reading, partial(read, *arguments))

    def readable(characters: Iterable[int]) -> None:
        """Raises UserError for a text that is too long for the context however few tokens it has."""
        most = backbone.context_length * longest_token
        if (longest := max(characters, default=0)) > most:
            raise UserError(
                f"the prompt has {longest} characters; the backbone's context holds {backbone.context_length} tokens"
            )

    def room(prompt: int, wanted: int | None, version: Version | None) -> int:
        """Tokens that may be written after so many. Raises UserError when the prompt fills the context."""
        virtual = version.virtual if version is not None else 0
        free = backbone.context_length - prompt - virtual
        if free < 1 or (wanted or 0) > free:
            raise UserError(
                f"the prompt has {prompt} tokens"
                + (f", the adapter {virtual}" if virtual else "")
                + (f" and {wanted} are to be written" if wanted else "")
                + f"; the backbone's context holds {backbone.context_length}"
            )
        return wanted or min(DEFAULT_TOKENS, free)

    def start(
        body: openai.Generate,
        version: Version | None,
        prompts: list[list[int]],
        limits: list[int],
        logprobs: int | None,
        events: asyncio.Queue[tuple[int, Piece | Exception]],
    ) -> list[Generation]:
        """Submit every prompt n times; answers come through `events` with their index. All or none are accepted."""
        deadline = time.monotonic() + service.bounds.seconds
        jobs = [
            Generation(
                source=version,
                prompt=ids,
                limit=limit,
                virtual=version.virtual if version is not None else 0,
                deliver=threadsafe(events, n),
                deadline=deadline,
                sampling=body.sampling(place, logprobs),
                stop=tuple(body.stop or ()),
                stream=body.stream,
            )
            for n, ((ids, limit), place) in enumerate(
                itertools.product(zip(prompts, limits, strict=True), range(body.n or 1))
            )
        ]
        engine.submit(*jobs)
        return jobs

    async def everything(
        request: Request, jobs: list[Generation], events: asyncio.Queue[tuple[int, Piece | Exception]]
    ) -> list[Piece]:
        found: dict[int, Piece] = {}
        while len(found) < len(jobs):
            n, piece = await first_of(request, events, jobs)
            found[n] = piece
        return [found[n] for n in range(len(jobs))]

    async def streamed(
        request: Request,
        body: openai.Generate,
        version: Version | None,
        record: dict[str, Any],
        jobs: list[Generation],
        events: asyncio.Queue[tuple[int, Piece | Exception]],
        choices: Callable[[int, Piece], list[dict[str, Any]]],
        prompt_tokens: int,
    ) -> Response:
        """Server-sent events. What fails before the first text is a plain error response."""
        service.given.remember(record["id"], label(version), [None] * len(jobs))
        begin = time.perf_counter()
        n, piece = await first_of(request, events, jobs)
        service.metrics.first.observe(time.perf_counter() - begin)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        extra = {"usage": None} if with_usage else {}

        async def lines() -> AsyncIterator[str]:
            nonlocal n, piece
            left = len(jobs)
            try:
                while True:
                    for choice in choices(n, piece):
                        yield sse({**record, "choices": [choice], **extra})
                    left -= piece.finished is not None
                    if not left:
                        break
                    n, event = await events.get()
                    if isinstance(event, Exception):
                        request.state.error, request.state.failed = traced(event), True
                        yield sse(openai.failure(said(event), "server_error"))
                        break
                    piece = event
                written = sum(written_by(job) for job in jobs)
                if with_usage:
                    yield sse({**record, "choices": [], "usage": openai.usage(prompt_tokens, written)})
                yield "data: [DONE]\n\n"
            finally:  # also when the client has gone
                request.state.written = written = sum(written_by(job) for job in jobs)
                service.metrics.tokens.labels(label(version)).inc(written)
                for job in jobs:
                    job.cancelled = True

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def note(request: Request, model: str, prompt_tokens: int) -> None:
        request.state.model, request.state.prompt_tokens = model, prompt_tokens

    def label(version: Version | None) -> str:
        return engine.name if version is None else version.key

    def fail(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(openai.failure(message, kind(status), code), status, headers)

    @app.exception_handler(UserError)
    async def bad_input(request: Request, error: UserError) -> JSONResponse:
        if isinstance(error, UnknownModel):
            return fail(404, str(error), "model_not_found")
        if out_of_reach(error):  # a file of the server's own; where it lies is nobody's business
            request.state.error = brief(error, 300)
            return fail(503, "the server cannot read or write its files now")
        return fail(400, str(error))

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> JSONResponse:
        request.state.error = brief(error.__cause__ or error, 300)
        return fail(503, str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        code = "rate_limit_exceeded" if isinstance(error, TooMany) else "server_busy"
        return fail(429, str(error), code, {"Retry-After": str(math.ceil(error.seconds))})

    @app.exception_handler(TooSlow)
    async def too_slow(request: Request, error: TooSlow) -> JSONResponse:
        return fail(504, str(error), "timeout")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return fail(400, f"{where}: {first['msg']}" if where else str(first["msg"]))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return fail(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    app.add_middleware(Guard, service=service)
    return app


PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """Around every request: bounds of size and time, the name the browser asked for, counting and one log line."""

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, read = time.perf_counter(), 0, 0
        headers = dict(scope["headers"])
        bounds = self.service.bounds
        most = bounds.rows_bytes if scope["path"] == "/v1/select" else bounds.body_bytes
        body_over = asyncio.get_running_loop().time() + bounds.receive_seconds
        complete = False
        id = secrets.token_hex(8)

        async def limited() -> Any:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(body_over):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {bounds.receive_seconds:.0f} s") from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > most:
                raise HTTPException(413, f"the body is larger than {most} bytes")
            return message

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > most:
                await refuse(told, 413, f"the body is larger than {most} bytes")
            elif self.service.local and not is_local(headers.get(b"host", b"")):
                await refuse(told, 403, "this server answers to localhost only")  # a page elsewhere used its name
            elif scope["method"] == "POST" and (problem := self._stranger(scope, headers)) is not None:
                await refuse(told, problem.status_code, problem.detail, problem.headers)  # before the body is read
            else:
                await self.app(scope, limited, told)
        except asyncio.CancelledError:
            status = status or 499
            raise
        except Exception as error:  # what no handler expects; further out nobody would count it
            scope.setdefault("state", {})["error"] = traced(error)
            if status:
                raise
            await refuse(told, 500, said(error))
        finally:
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "-")  # never the path itself: it is the caller's text
            state = scope.get("state", {})
            status = 500 if state.get("failed") else status  # in the middle of a stream, after its 200
            self.service.metrics.requests.labels(route, str(status)).inc()
            self.service.metrics.seconds.labels(route).observe(seconds)
            self.service.log(
                {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "event": "request",
                    "id": id,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "ms": round(1000 * seconds, 1),
                    **{k: state[k] for k in ("key", "model", "prompt_tokens", "written", "error") if k in state},
                }
            )

    def _stranger(self, scope: dict[str, Any], headers: Mapping[bytes, bytes]) -> HTTPException | None:
        """Why a request is not this service's caller's; None: it is."""
        try:
            known_by(self.service, headers.get(b"authorization", b"").decode("latin-1"))
        except HTTPException as problem:
            return problem
        except Unavailable as error:
            scope.setdefault("state", {})["error"] = brief(error.__cause__ or error, 300)
            return HTTPException(503, str(error))
        return None


def kind(status: int) -> str:
    """OpenAI's name for what a status says."""
    return STATUS.get(status, "server_error" if status >= 500 else "invalid_request_error")


async def refuse(send: Send, status: int, message: str, more: Mapping[str, str] | None = None) -> None:
    body = json.dumps(openai.failure(message, kind(status))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in (more or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})


def is_local(host: bytes) -> bool:
    """Whether a Host header names this machine: a web page that a name of its own brought here does not."""
    name = host.decode("latin-1").rsplit(":", 1)[0] if not host.endswith(b"]") else host.decode("latin-1")
    return name.lower() in ("localhost", "127.0.0.1", "[::1]", "")


def threadsafe(events: asyncio.Queue[Any], index: int | None = None) -> Callable[[Any], None]:
    """Puts what the engine's thread delivers into a queue of the running loop, with `index` if there is one."""
    loop = asyncio.get_running_loop()

    def deliver(event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(events.put_nowait, event if index is None else (index, event))

    return deliver


async def first_of(request: Request, events: asyncio.Queue[Any], jobs: list[Any]) -> Any:
    """The next event. Raises what the engine delivered; cancels the jobs when the client has gone."""
    waiting = asyncio.ensure_future(events.get())
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise HTTPException(499, "the client has gone")
        event = waiting.result()
        problem = event[1] if isinstance(event, tuple) else event
        if isinstance(problem, Exception):
            raise problem
        return event
    except BaseException:
        for job in jobs:
            job.cancelled = True
        raise
    finally:
        waiting.cancel()
        gone.cancel()


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def written_by(job: Generation) -> int:
    return len(job.row.written) if job.row is not None else 0


def said(error: Exception) -> str:
    """What a caller may know of a failure inside: its kind, and for ours its message."""
    ours = isinstance(error, UserError | Busy | TooSlow | Unavailable)
    return str(error) if ours else f"internal error ({type(error).__name__})"


def traced(error: Exception) -> str:
    """For the log: a failure's kind and the calls that led to it, last first; its message may be the caller's text."""
    calls = traceback.extract_tb(error.__traceback__)[-8:]
    return " < ".join([type(error).__name__, *(f"{Path(c.filename).name}:{c.lineno}" for c in reversed(calls))])


def sse(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"
