"""One admitted request's work: fetching, preparing, and its events up to the last one or the error that ended it.

In: a host that has the engine and a place for it, a deadline, GenerationRequests. Out: batches of TokenEvents. It knows
neither HTTP nor who else is admitted. Its span is the request's: preparing is timed here, the engine's stages come with
the last event, as durations that are laid out back to back up to it.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from model_core.analysis.compare import collect_answer
from model_core.errors import DualVisionError, RequestFailedError
from model_core.types import GenerationRequest, Timings, TokenEvent
from service.deadline import Deadline, late
from service.errors import rule_for
from service.fleet import Member
from service.inbox import Inbox
from service.metrics import Metrics, RequestRecorder
from service.tracing.span import Span, current_span, laid_out

T = TypeVar("T")
K = TypeVar("K")


class AdmissionHost(Protocol):
    """Who admitted it: the engine client."""

    metrics: Metrics
    clock: Callable[[], float]
    pool: ThreadPoolExecutor
    num_busy: int

    def ready_engine(self) -> object: ...

    def prepare(self, request_id: str, work: Callable[[], object], inbox: Inbox) -> None: ...

    def submit(self, request_id: str, prepared: object, inbox: Inbox) -> None: ...

    def leave(self, request_id: str, inbox: Inbox) -> None: ...


class Admission:
    """One admitted request, or a family of them that shares a place and a deadline (a comparison)."""

    def __init__(self, host: AdmissionHost, member: Member, deadline: Deadline) -> None:
        """member: the model that answers."""
        self._host, self.member, self._deadline = host, member, deadline
        self._fetch_seconds = 0.0
        self._span: Span = current_span.get()

    async def wait(self, work: Awaitable[T]) -> T:
        """Await anything else within the request's time."""
        return await self._deadline.bound(work)

    async def fetch(self, work: Awaitable[T]) -> T:
        """Await what the request needs from elsewhere; the time counts as the preprocessing of its first sequence."""
        host, begin = self._host, self._host.clock()
        host.num_busy += 1
        try:
            return await self._deadline.bound(work)
        finally:
            host.num_busy -= 1
            self._fetch_seconds = host.clock() - begin
            host.metrics.preprocess_stages.labels("download").observe(self._fetch_seconds)
            now = time.monotonic()
            self._span.child("download", now - self._fetch_seconds, now)

    async def in_pool(self, work: Callable[[], T]) -> T:
        """Run blocking work in the preprocess pool. A cancelled caller's work is not begun, or not awaited."""
        host = self._host
        host.num_busy += 1
        try:
            # In the caller's context: its ids stand in the pool's log lines too.
            work = partial(contextvars.copy_context().run, work)
            return await self._deadline.bound(asyncio.get_running_loop().run_in_executor(host.pool, work))
        finally:
            host.num_busy -= 1

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events up to the terminal one, or the error that ended the request. Leaving early aborts it."""
        async with aclosing(self.generate_choices([request])) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def generate_choices(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_begin: Callable[[], None] = lambda: None,
        is_patient: bool = False,
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Several answers to one prompt: events of all, each by its request's id, until every one has ended.

        As many at once as have come; `is_patient`: one answer's all at once, when it is whole. `on_begin` is called at
        the first event. The first error of any ends all, and so does leaving early. The first request goes ahead: once
        its prompt is computed, the others find it in the prefix cache instead of computing it beside it.
        """
        host = self._host
        recorders = {r.request_id: self._recorder(r, is_copy=i > 0) for i, r in enumerate(requests)}
        inbox = Inbox(
            lambda event: recorders[event.request_id].observe(event),
            on_begin,
            is_patient=is_patient and len(requests) == 1,
        )
        failure: BaseException | None = None
        self._deadline.watch(inbox, requests[0].request_id)
        try:
            others = await self._begin(requests, inbox)
            while recorders:
                batch, error = _until_error(await inbox.take())
                for event in batch:
                    if event.is_terminal:
                        recorders.pop(event.request_id).finish(None)
                        tell_end(self._span, event, self.member.info.model_id)
                while others and batch:
                    host.submit(*others.pop(0), inbox)
                if batch:
                    yield batch
                if error is not None:
                    raise self._in_time(error)
        except Exception as error:
            failure = error
            self._span.fail(rule_for(error).code)
            raise
        finally:
            self._deadline.forget(inbox)
            for request in requests:
                host.leave(request.request_id, inbox)
            for recorder in recorders.values():
                recorder.finish(failure)

    async def _begin(self, requests: Sequence[GenerationRequest], inbox: Inbox) -> list[tuple[str, object]]:
        """The first request is on its way to the engine. Returns the others, prepared, by their ids."""
        host, first, member = self._host, requests[0], self.member
        host.ready_engine()  # or what became of it
        if self._deadline.is_over:
            return []  # which stands in the inbox
        work = self._timed(partial(member.prepare, self._until_deadline(first)), len(first.messages))
        if len(requests) == 1:
            # In the caller's context, as in_pool has it.
            host.prepare(first.request_id, partial(contextvars.copy_context().run, work), inbox)
            return []
        prepared = await self.in_pool(work)
        host.submit(first.request_id, prepared, inbox)
        return [
            (request.request_id, await self.in_pool(partial(member.fork, prepared, self._until_deadline(request))))
            for request in requests[1:]
        ]

    def _timed(self, work: Callable[[], T], num_messages: int) -> Callable[[], T]:
        span, begin = self._span, time.monotonic()

        def timed() -> T:
            try:
                return work()
            finally:
                span.child("prepare", begin, time.monotonic(), dve__num_messages=num_messages)

        return timed

    def _recorder(self, request: GenerationRequest, *, is_copy: bool) -> RequestRecorder:
        is_fused = request.arm == "fused" and request.score_token_ids is None
        return RequestRecorder(self._host.metrics, self._host.clock, is_fused=is_fused, is_copy=is_copy)

    def _until_deadline(self, request: GenerationRequest) -> GenerationRequest:
        # The engine gets the deadline too: what has run out of time while it queued is not computed.
        left = max(self._deadline.at - asyncio.get_running_loop().time(), 0.0)
        spent, self._fetch_seconds = self._fetch_seconds, 0.0
        return replace(request, timeout_seconds=left, fetch_seconds=spent)

    def _in_time(self, error: DualVisionError) -> DualVisionError:
        """The engine may see the deadline pass before we do: then it is the same end by another name."""
        return late() if self._deadline.is_past and isinstance(error, RequestFailedError) else error

    async def answer(self, request: GenerationRequest) -> TokenEvent:
        async with aclosing(self.generate(request)) as events:
            return collect_answer([event async for event in events])

    async def answer_all(self, requests: Mapping[K, GenerationRequest]) -> dict[K, TokenEvent]:
        """All at once, so that the engine batches them. The first failure ends the others."""
        tasks = [asyncio.ensure_future(self.answer(request)) for request in requests.values()]
        try:
            return dict(zip(requests, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def tell_end(span: Span, event: TokenEvent, model_id: str) -> None:
    """One answer's stages and counts, of its terminal event."""
    if event.usage is not None:
        span.set(
            gen_ai__request__model=model_id,
            gen_ai__usage__input_tokens=event.usage.prompt_tokens,
            gen_ai__usage__output_tokens=event.usage.completion_tokens,
            dve__finish_reason=event.finish_reason or "",
            dve__cached_tokens=event.usage.cached_tokens,
            dve__vision_tokens=event.usage.image_tokens,
            dve__num_images=len(event.usage.image_pixels),
        )
    if event.timings is not None:
        _tell_stages(span, event.timings, time.monotonic())


def _tell_stages(span: Span, timings: Timings, end: float) -> None:
    stages = ("queue", "encode", "prefill", "decode")
    for stage, begin, until in laid_out([(s, getattr(timings, f"{s}_seconds")) for s in stages], end):
        span.child(stage, begin, until)
        if stage == "encode":
            for encoder, seconds in timings.encoder_seconds.items():
                span.child("encoder", begin, min(begin + seconds, until), dve__encoder=encoder)


def _until_error(events: list[TokenEvent]) -> tuple[list[TokenEvent], DualVisionError | None]:
    for index, event in enumerate(events):
        if event.error is not None:
            return events[:index], event.error
    return events, None
