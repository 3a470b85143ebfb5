"""`POST /v1/chat/completions`, streaming and not, with one choice or several."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from model_core.types import FusionWeights, ModelInfo, TokenEvent, TokenLogprob, Usage
from service.fleet import Member
from service.fusion_history import Served
from service.keys import Caller
from service.logs import request_id_var
from service.messages import transcript
from service.protocol.body import header_list, parse_body
from service.protocol.chat import ChatCompletionRequest
from service.reports import fusion_entries
from service.routes.direct import DirectRoute
from service.routes.parts import AppParts, caller_of, parts_of
from service.streaming import DONE, SseResponse, to_frame, until_disconnect
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

router = APIRouter(route_class=DirectRoute)

#: Events, each with the index of the choice that it belongs to.
Batch = list[tuple[int, TokenEvent]]


@dataclass(frozen=True, slots=True)
class _Chat:
    """One chat request under way."""

    parts: AppParts
    body: ChatCompletionRequest
    plan: ChatPlan
    member: Member
    waiting_body: WaitingBody
    give_back: Callable[[], None]
    caller: Caller
    completion_id: str
    created: int
    #: What each choice says, where the log is to hold it.
    said: dict[int, str] | None

    @property
    def info(self) -> ModelInfo:
        return self.member.info

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Events of all choices as they come; the error of one ends all."""
        self.give_back()
        with self.parts.client.admit(self.plan.num_choices, self.member) as admission:
            messages = await self.parts.read_messages(admission, self.body.messages, self.waiting_body, self.caller)
            requests = to_requests(self.plan, messages, self.completion_id)
            index_of = {request.request_id: index for index, request in enumerate(requests)}
            # Once the engine has begun, this body waits no longer.
            batches = admission.generate_choices(
                requests, on_begin=self.waiting_body.release, is_patient=not self.plan.is_stream
            )
            async with aclosing(batches):
                async for batch in batches:
                    found = [(index_of[event.request_id], event) for event in batch]
                    if self.said is not None:
                        for index, event in found:
                            self.said[index] = self.said.get(index, "") + event.text
                    yield found

    def remember(self, fusion: tuple[FusionWeights, ...]) -> None:
        ids = self.caller.key_id, request_id_var.get(), self.completion_id
        self.parts.history.add(Served(*ids, self.plan.model, self.created, tuple(fusion)))

    def headers(self, usage: Usage | None) -> dict[str, str]:
        headers = {}
        if self.plan.ignored:
            headers["x-dve-ignored"] = header_list(list(self.plan.ignored))
        if (left := clamped_max_tokens(self.plan, self.info, usage)) is not None:
            headers["x-dve-clamped"] = f"max_tokens={left}"
        return headers


@router.post("/v1/chat/completions", operation_id="create_chat_completion")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation with images. `fusion` in the answer tells how each image was routed."""
    parts, caller = parts_of(request), caller_of(request)
    # Before the body is read: a full server refuses cheaply.
    with parts.client.arrive() as give_back:
        body = parse_body(ChatCompletionRequest, await request.body(), request.headers.get("content-type"))
        # Before anything in the body is decoded: whether there is such a model.
        member = await parts.find_model(request, body.model, give_back)
        plan = plan_chat(body, member.info)
        completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        request.state.log_fields = {"completion_id": completion_id, "model": plan.model, "user": plan.user}
        said: dict[int, str] | None = None
        if parts.settings.log_content:
            said = {}
            request.state.log_fields |= {"messages": transcript(body.messages), "answers": said}
        waiting_body, created = request.state.waiting_body, int(parts.now())
        chat = _Chat(parts, body, plan, member, waiting_body, give_back, caller, completion_id, created, said)
        if plan.is_stream:
            return await _stream(request, chat)
        return await until_disconnect(request, _complete(chat))


async def _complete(chat: _Chat) -> Response:
    by_choice: list[list[TokenEvent]] = [[] for _ in range(chat.plan.num_choices)]
    async with aclosing(chat.batches()) as batches:
        async for batch in batches:
            for index, event in batch:
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
    batches = chat.batches()

    async def first_batch() -> Batch:
        return await anext(batches)

    # The first event is awaited before a byte is sent, so that whatever is wrong has its own status.
    first = await until_disconnect(request, first_batch())
    event = first[0][1]
    chat.remember(event.fusion or ())
    return SseResponse(
        _pieces(chat, first, batches),
        batches.aclose,
        request_id=request_id_var.get(),
        headers=chat.headers(event.usage),
    )


async def _pieces(chat: _Chat, first: Batch, rest: AsyncGenerator[Batch, None]) -> AsyncGenerator[bytes, None]:
    """Frames, those of one batch together."""
    frames = _Frames(chat, fusion_entries(first[0][1].fusion or (), chat.info.encoders))
    yield b"".join(frame for index, event in first for frame in frames.of_event(index, event)) + frames.end()
    async for batch in rest:
        yield b"".join(frame for index, event in batch for frame in frames.of_event(index, event)) + frames.end()


class _Frames:
    """For each choice a role, its text as it comes, and its end; for all together the usage, if asked for."""

    def __init__(self, chat: _Chat, fusion: list[dict[str, Any]]) -> None:
        self._chat, self._fusion = chat, fusion
        self._begun: set[int] = set()
        self._usages: dict[int, Usage | None] = {}
        # What all frames of text have in common is written once.
        whole = _chunk(chat, 0, {"content": ""})
        self._head, _, self._tail = whole.partition(b'0,"delta":{"content":""}')

    def of_event(self, index: int, event: TokenEvent) -> Iterator[bytes]:
        if index not in self._begun:
            # The prompt's routing rides on the first chunk of all.
            fusion = None if self._begun else self._fusion
            yield _chunk(self._chat, index, {"role": "assistant", "content": ""}, fusion=fusion)
            self._begun.add(index)
        if event.logprobs:
            yield _chunk(self._chat, index, {"content": event.text}, logprobs=event.logprobs)
        elif event.text:
            text = encode_basestring_ascii(event.text).encode("ascii")
            yield b'%b%d,"delta":{"content":%b}%b' % (self._head, index, text, self._tail)
        if event.is_terminal:
            yield _chunk(self._chat, index, {}, finish_reason=to_finish_reason(event.finish_reason))
            self._usages[index] = event.usage

    def end(self) -> bytes:
        """Empty until every choice has ended."""
        if len(self._usages) < self._chat.plan.num_choices:
            return b""
        if not self._chat.plan.include_usage:
            return DONE
        usage = to_usage(total_usage([self._usages[index] for index in sorted(self._usages)])).model_dump()
        return to_frame({**_base(self._chat), "choices": [], "usage": usage, "fusion": self._fusion}) + DONE


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
