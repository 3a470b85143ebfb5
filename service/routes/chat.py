"""`POST /v1/chat/completions`, streaming and not, with one choice or several."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from model_core.types import FusionWeights, ModelInfo, TokenEvent, TokenLogprob, Usage
from service.fleet import Member
from service.fusion_history import Served
from service.logs import request_id_var
from service.protocol.body import header_list, parse_body
from service.protocol.chat import ChatCompletionRequest
from service.reports import fusion_entries
from service.routes.parts import AppParts, Parts
from service.streaming import SseResponse, to_frame, until_disconnect
from service.translate import (
    ChatPlan,
    clamped_max_tokens,
    fold_answer,
    plan_chat,
    server_timing,
    to_completion,
    to_finish_reason,
    to_logprobs,
    to_requests,
    to_usage,
    total_usage,
)
from service.waiting import WaitingBody

router = APIRouter()

#: An event and the index of the choice that it belongs to.
Indexed = tuple[int, TokenEvent]


@dataclass(frozen=True, slots=True)
class _Chat:
    """One chat request under way."""

    parts: AppParts
    body: ChatCompletionRequest
    plan: ChatPlan
    member: Member
    waiting_body: WaitingBody
    completion_id: str
    created: int

    @property
    def info(self) -> ModelInfo:
        return self.member.info

    async def events(self) -> AsyncGenerator[Indexed, None]:
        """Of all choices as they come; the error of one ends all."""
        with self.parts.client.admit(self.plan.num_choices, self.member) as admission:
            messages = await self.parts.read_messages(admission, self.body.messages, self.waiting_body)
            requests = to_requests(self.plan, messages, self.completion_id)
            index_of = {request.request_id: index for index, request in enumerate(requests)}
            async with aclosing(admission.generate_choices(requests)) as events:
                async for event in events:
                    # The engine has begun: this body waits no longer.
                    self.waiting_body.release()
                    yield index_of[event.request_id], event

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
    # Before the body is read: a full server refuses cheaply.
    parts.client.check_room()
    body = parse_body(ChatCompletionRequest, await request.body(), request.headers.get("content-type"))
    # Before anything in the body is decoded: whether there is such a model.
    member = await parts.find_model(request, body.model)
    plan = plan_chat(body, member.info)
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    chat = _Chat(parts, body, plan, member, request.state.waiting_body, completion_id, int(parts.now()))
    request.state.log_fields = {"completion_id": chat.completion_id, "model": plan.model, "user": plan.user}
    if plan.is_stream:
        return await _stream(request, chat)
    return await until_disconnect(request, _complete(chat))


async def _complete(chat: _Chat) -> Response:
    by_choice: list[list[TokenEvent]] = [[] for _ in range(chat.plan.num_choices)]
    async with aclosing(chat.events()) as events:
        async for index, event in events:
            by_choice[index].append(event)
    answers = [fold_answer(choice) for choice in by_choice]
    chat.remember(answers[0].fusion or ())
    completion = to_completion(
        chat.plan,
        answers,
        chat.info,
        chat.parts.client.token_text,
        completion_id=chat.completion_id,
        created=chat.created,
    ).model_dump()
    if completion["metadata"] is None:
        del completion["metadata"]
    headers = chat.headers(answers[0].usage)
    if timing := server_timing(answers[0].timings):
        headers["server-timing"] = timing
    return JSONResponse(completion, headers=headers)


async def _stream(request: Request, chat: _Chat) -> Response:
    events = chat.events()

    async def first_event() -> Indexed:
        return await anext(events)

    # The first event is awaited before a byte is sent, so that whatever is wrong has its own status.
    first = await until_disconnect(request, first_event())
    chat.remember(first[1].fusion or ())
    return SseResponse(
        _frames(chat, first, events),
        events.aclose,
        request_id=request_id_var.get(),
        headers=chat.headers(first[1].usage),
    )


async def _frames(chat: _Chat, first: Indexed, rest: AsyncGenerator[Indexed, None]) -> AsyncGenerator[bytes, None]:
    """For each choice a role, its text as it comes, and its end; for all together the usage, if asked for."""
    fusion = fusion_entries(first[1].fusion or (), chat.info.encoders)
    begun: set[int] = set()
    usages: dict[int, Usage | None] = {}
    index, event = first
    while True:
        if index not in begun:
            # The prompt's routing rides on the first chunk of all.
            yield _chunk(chat, index, {"role": "assistant", "content": ""}, fusion=None if begun else fusion)
            begun.add(index)
        if event.text or event.logprobs:
            yield _chunk(chat, index, {"content": event.text}, logprobs=event.logprobs)
        if event.is_terminal:
            yield _chunk(chat, index, {}, finish_reason=to_finish_reason(event.finish_reason))
            usages[index] = event.usage
            if len(usages) == chat.plan.num_choices:
                break
        index, event = await anext(rest)
    if chat.plan.include_usage:
        usage = total_usage([usages[index] for index in sorted(usages)])
        yield to_frame({**_base(chat), "choices": [], "usage": to_usage(usage).model_dump(), "fusion": fusion})


def _base(chat: _Chat) -> dict[str, Any]:
    return {
        "id": chat.completion_id,
        "object": "chat.completion.chunk",
        "created": chat.created,
        "model": chat.plan.model,
        "system_fingerprint": chat.info.fingerprint,
    }


def _chunk(
    chat: _Chat,
    index: int,
    delta: dict[str, Any],
    *,
    logprobs: tuple[TokenLogprob, ...] | None = None,
    finish_reason: str | None = None,
    fusion: list[dict[str, Any]] | None = None,
) -> bytes:
    told = None if logprobs is None else to_logprobs(logprobs, chat.parts.client.token_text)
    data = _base(chat)
    data["choices"] = [{"index": index, "delta": delta, "logprobs": told, "finish_reason": finish_reason}]
    if chat.plan.include_usage:
        data["usage"] = None
    if fusion is not None:
        data["fusion"] = fusion
    return to_frame(data)
