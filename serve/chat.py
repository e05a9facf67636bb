"""The OpenAI-shaped routes: chat completions with memory, models, embeddings."""

import base64
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from memcube.activation.contract import FinishReason, Mode, Sampling
from memcube.catalog import AdapterRecord, Principal, Role
from memcube.chat.contract import Parametric, Turn
from memcube.chat.service import ChatRequest, ChatService, Chunk, MemoryChoice, Report
from memcube.context import estimate_tokens
from memcube.embedding.contract import Purpose
from memcube.errors import (
    BadRequest,
    Forbidden,
    LimitExceeded,
    MemCubeError,
    NotFound,
    UnknownBackend,
)
from memcube.filters import parse_filter
from memcube.service import SearchScope
from serve import chat_models as models
from serve import problems
from serve.backend import Backend
from serve.dependencies import Here, Reader, guarded
from serve.metrics import Metrics

ModelName = Annotated[str, Path(max_length=256, examples=["SmolLM2-135M-Instruct"])]
openai = guarded("/v1", "openai")


@openai.post(
    "/chat/completions", response_model=models.ChatOut, summary="Chat, with memories attached"
)
async def chat(body: models.ChatBody, who: Reader, here: Here, request: Request) -> Response:
    """OpenAI's shape, streaming and not. The answer's `memory` says which cubes were in the prompt,
    in which form, and what was attached and what read."""
    service = _chat_of(here)
    name, adapter = _checked_model(body.model, here)
    asked = _chat_request(body, who, here, adapter)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
    metrics = request.app.state.metrics
    answers = service.answer(who, asked)
    # What can be refused is refused before a stream begins: its status is sent with its first byte.
    try:
        first = await anext(answers)
    except BaseException as refused:
        await answers.aclose()
        if isinstance(refused, MemCubeError):
            metrics.chats_refused.labels(refused.code).inc()
        raise
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        lines = _events(head, first, answers, metrics, with_usage, problems.request_id(request))
        return StreamingResponse(lines, media_type="text/event-stream")
    text, last = [first.text], first
    async with aclosing(answers):
        async for chunk in answers:
            text.append(chunk.text)
            last = chunk
    assert last.report is not None
    metrics.answered(last.report)
    message = {"role": "assistant", "content": "".join(text), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": _finish(last), "logprobs": None}
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(last.report),
            "memory": memory_report(last.report),
        }
    )


async def _events(
    head: dict[str, Any],
    first: Chunk,
    rest: AsyncGenerator[Chunk],
    metrics: Metrics,
    with_usage: bool,
    request_id: str,
) -> AsyncGenerator[bytes]:
    """Server-sent events as OpenAI's client reads them. Closing them ends the work."""

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    def delta(content: dict[str, str], finish: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": content, "finish_reason": finish, "logprobs": None}]

    yield event(delta({"role": "assistant", "content": ""}))
    chunk = first
    try:
        async with aclosing(rest):
            while True:
                if chunk.text:
                    yield event(delta({"content": chunk.text}))
                if chunk.report is not None:
                    metrics.answered(chunk.report)
                    more = {"memory": memory_report(chunk.report)}
                    yield event(delta({}, _finish(chunk)), **more)
                    if with_usage:
                        yield event([], usage=usage(chunk.report))
                    break
                chunk = await anext(rest)
    except MemCubeError as failed:
        # The status is long sent: an event tells what went wrong, and no [DONE] follows.
        error = {"message": str(failed), "type": failed.code, "code": failed.code}
        yield (
            b"data: " + json.dumps({"error": error | {"request_id": request_id}}).encode() + b"\n\n"
        )
        return
    yield b"data: [DONE]\n\n"


@openai.get("/models", response_model=models.ModelsOut, summary="Models")
async def list_models(who: Reader, here: Here) -> JSONResponse:
    """The chat model, where one is loaded; with each adapter of the tenant's that serves, `MODEL:ADAPTER`;
    and the embedder."""
    return JSONResponse({"object": "list", "data": list((await _models(who, here)).values())})


@openai.get("/models/{name}", response_model=models.ModelOut, summary="One model")
async def get_model(name: ModelName, who: Reader, here: Here) -> JSONResponse:
    """Whether it is there."""
    found = (await _models(who, here)).get(name)
    if found is None:
        raise NotFound("model", name[:64])
    return JSONResponse(found)


async def _models(who: Principal, here: Backend) -> dict[str, dict[str, Any]]:
    """OpenAI's shape of what this tenant may name, by name."""
    created: dict[str, int] = {}
    if here.chat_model is not None:
        created[here.chat_model] = here.started_at
        for adapter in await here.adapters.serving(who.tenant) if here.adapters else ():
            since = adapter.activated_at or adapter.created_at
            created[f"{here.chat_model}:{adapter.line.name}"] = int(since.timestamp())
    created.setdefault(here.config.embedder.model, here.started_at)
    return {
        name: {"id": name, "object": "model", "created": since, "owned_by": "memcube"}
        for name, since in created.items()
    }


@openai.post("/embeddings", response_model=models.EmbeddingsOut, summary="Embed texts")
async def embeddings(body: models.EmbeddingsBody, who: Reader, here: Here) -> JSONResponse:
    """Unit vectors of the system's embedder, as queries are embedded."""
    if body.model != here.config.embedder.model:
        raise UnknownBackend("embedding model", body.model, (here.config.embedder.model,))
    texts = [body.input] if isinstance(body.input, str) else body.input
    limit = here.config.limits.text_chars
    for text in texts:
        if len(text) > limit:
            raise LimitExceeded("characters of input", limit, len(text))
        if not text:
            raise BadRequest("holds an empty text", "input")
    vectors = await here.embedder.embed(texts, Purpose.PASSAGE)
    tokens = sum(map(estimate_tokens, texts))
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
                    if body.encoding_format == "base64"
                    else vector.tolist(),
                }
                for i, vector in enumerate(vectors)
            ],
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _chat_of(here: Backend) -> ChatService:
    if here.chat is None:
        raise UnknownBackend("chat model", "none", ("none: start with activation.actors=1",))
    return here.chat


def _checked_model(name: str, here: Backend) -> tuple[str, str | None]:
    """The model's name as it was given, and the adapter that it names: ``base:adapter``."""
    if name == here.chat_model:  # which may itself hold a colon
        return name, None
    base, colon, adapter = name.rpartition(":")
    if base != here.chat_model or not colon:
        raise UnknownBackend("model", name, (str(here.chat_model),))
    return name, adapter


def _chat_request(
    body: models.ChatBody, who: Principal, here: Backend, adapter: str | None
) -> ChatRequest:
    config = here.config
    if len(body.messages) > config.limits.messages:
        raise LimitExceeded("messages", config.limits.messages, len(body.messages))
    turns = tuple(
        Turn(role="system" if m.role == "developer" else m.role, content=_text(m))
        for m in body.messages
    )
    characters = sum(len(turn.content) for turn in turns)
    if characters > config.limits.text_chars:
        raise LimitExceeded("characters of messages", config.limits.text_chars, characters)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return ChatRequest(
        turns=turns,
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
        ),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=stop,
        memory=_memory(body, who, here),
        adapter=adapter,
    )


def _text(message: models.ChatMessage) -> str:
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content)
    return message.content or ""


def _memory(body: models.ChatBody, who: Principal, here: Backend) -> MemoryChoice | None:
    wanted = body.memory
    if wanted is False or (wanted is None and body.user is None):
        return None
    if wanted is None:
        wanted = models.MemoryBody.model_validate({"user_id": body.user})
    if wanted.token_budget > here.config.limits.token_budget:
        raise LimitExceeded(
            "memory.token_budget", here.config.limits.token_budget, wanted.token_budget
        )
    if wanted.write_back and not who.role.allows(Role.WRITER):
        raise Forbidden(who.role, Role.WRITER)
    return MemoryChoice(
        scope=SearchScope(
            user_id=wanted.user_id,
            agent_id=wanted.agent_id,
            run_id=wanted.run_id,
            filters=parse_filter(wanted.filters),
            cube_ids=tuple(wanted.cube_ids),
        ),
        token_budget=wanted.token_budget,
        mode=wanted.mode or Mode(here.config.chat.mode),
        parametric=wanted.parametric or Parametric(here.config.chat.parametric),
        write_back=wanted.write_back,
    )


def _finish(chunk: Chunk) -> str:
    # OpenAI has no word for a deadline: the answer was cut, as by its length.
    return "stop" if chunk.finish is FinishReason.STOP else "length"


def usage(report: Report) -> dict[str, Any]:
    """OpenAI's figures; attached tokens are its cached ones."""
    u = report.usage
    return {
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.prompt_tokens + u.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": u.attached_exact + u.attached_composed},
    }


def memory_report(report: Report) -> dict[str, Any]:
    """How the memories got into the answer."""
    u = report.usage
    return {
        "mode": report.mode,
        "cubes": [asdict(use) for use in report.cubes],
        "tokens_attached": u.attached_exact,
        "tokens_composed": u.attached_composed,
        "tokens_recomputed": u.recomputed,
        "tokens_prefilled": u.prefilled,
        "ttft_ms": round(u.ttft_s * 1e3, 3),
        "queue_ms": round(u.queue_s * 1e3, 3),
        "retrieval_ms": round(report.retrieval_ms, 3),
        "engine": report.engine,
        "written_back": list(report.written_back),
        "adapter": None if report.adapter is None else _version(report.adapter),
        "adapter_refused": None
        if report.refusal is None
        else {**_version(report.refusal.adapter), "code": report.refusal.code},
    }


def _version(adapter: AdapterRecord) -> dict[str, Any]:
    return {"id": adapter.line.id, "name": adapter.line.name, "version": adapter.version}
