"""`POST /v1/chat/completions`, streaming and not."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from model_core.analysis.compare import collect_answer
from model_core.types import FusionWeights, GenerationRequest, ModelInfo, TokenEvent, Usage
from service.fusion_history import Served
from service.logs import request_id_var
from service.protocol.body import header_list, parse_body
from service.protocol.chat import ChatCompletionRequest
from service.routes.parts import AppParts, Parts
from service.streaming import SseResponse, to_frame, until_disconnect
from service.translate import (
    ChatPlan,
    clamped_max_tokens,
    fusion_entries,
    plan_chat,
    server_timing,
    to_completion,
    to_finish_reason,
    to_usage,
)

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Chat:
    """One chat request under way."""

    parts: AppParts
    body: ChatCompletionRequest
    plan: ChatPlan
    info: ModelInfo
    completion_id: str
    created: int

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        with self.parts.client.admit() as admission:
            messages = await admission.in_pool(lambda: self.parts.read_messages(self.body.messages))
            request = GenerationRequest(self.completion_id, messages, self.plan.sampling, self.plan.arm)
            async with aclosing(admission.generate(request)) as events:
                async for event in events:
                    yield event

    def remember(self, fusion: tuple[FusionWeights, ...]) -> None:
        self.parts.history.add(
            Served(request_id_var.get(), self.completion_id, self.plan.model, self.created, tuple(fusion))
        )

    def headers(self, usage: Usage | None) -> dict[str, str]:
        headers = {}
        if self.plan.ignored:
            headers["x-dve-ignored"] = header_list(list(self.plan.ignored))
        if (left := clamped_max_tokens(self.plan, self.info, usage)) is not None:
            headers["x-dve-clamped"] = f"max_tokens={left}"
        return headers


@router.post("/v1/chat/completions", operation_id="create_chat_completion")
async def create_chat_completion(request: Request, parts: Parts) -> Response:
    """Answer a conversation with images. `fusion` in the answer tells how each image was routed."""
    body = parse_body(ChatCompletionRequest, await request.body(), request.headers.get("content-type"))
    info = parts.client.info
    plan = plan_chat(body, info)
    chat = _Chat(parts, body, plan, info, f"chatcmpl-{uuid.uuid4().hex}", int(parts.now()))
    request.state.log_fields = {"completion_id": chat.completion_id, "model": plan.model, "user": plan.user}
    if plan.is_stream:
        return await _stream(request, chat)
    return await until_disconnect(request, _complete(chat))


async def _complete(chat: _Chat) -> Response:
    async with aclosing(chat.events()) as events:
        answer = collect_answer([event async for event in events])
    chat.remember(answer.fusion or ())
    completion = to_completion(
        chat.plan, answer, chat.info, completion_id=chat.completion_id, created=chat.created
    ).model_dump()
    if completion["metadata"] is None:
        del completion["metadata"]
    headers = chat.headers(answer.usage)
    if timing := server_timing(answer.timings):
        headers["server-timing"] = timing
    return JSONResponse(completion, headers=headers)


async def _stream(request: Request, chat: _Chat) -> Response:
    events = chat.events()

    async def first_event() -> TokenEvent:
        return await anext(events)

    # The first event is awaited before a byte is sent, so that whatever is wrong has its own status.
    first = await until_disconnect(request, first_event())
    chat.remember(first.fusion or ())
    return SseResponse(
        _frames(chat, first, events),
        events.aclose,
        request_id=request_id_var.get(),
        headers=chat.headers(first.usage),
    )


async def _frames(
    chat: _Chat, first: TokenEvent, rest: AsyncGenerator[TokenEvent, None]
) -> AsyncGenerator[bytes, None]:
    fusion = fusion_entries(first.fusion or (), chat.info.encoders)
    yield _chunk(chat, {"role": "assistant", "content": ""}, fusion=fusion)
    event = first
    while True:
        if event.text:
            yield _chunk(chat, {"content": event.text})
        if event.is_terminal:
            break
        event = await anext(rest)
    yield _chunk(chat, {}, finish_reason=to_finish_reason(event.finish_reason))
    if chat.plan.include_usage:
        yield _usage_chunk(chat, event.usage, fusion)


def _base(chat: _Chat) -> dict[str, Any]:
    return {
        "id": chat.completion_id,
        "object": "chat.completion.chunk",
        "created": chat.created,
        "model": chat.plan.model,
        "system_fingerprint": chat.info.fingerprint,
    }


def _chunk(
    chat: _Chat, delta: dict[str, Any], *, finish_reason: str | None = None, fusion: list[dict[str, Any]] | None = None
) -> bytes:
    data = _base(chat)
    data["choices"] = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
    if chat.plan.include_usage:
        data["usage"] = None
    if fusion is not None:
        data["fusion"] = fusion
    return to_frame(data)


def _usage_chunk(chat: _Chat, usage: Usage | None, fusion: list[dict[str, Any]]) -> bytes:
    return to_frame({**_base(chat), "choices": [], "usage": to_usage(usage).model_dump(), "fusion": fusion})
