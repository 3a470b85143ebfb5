"""The bridge between asyncio and the synchronous `Engine`: admission, deadlines, and events as async iterators.

In: GenerationRequests, within an admission. Out: each request's TokenEvents as an async iterator that
ends after the terminal event or raises the request's error, exactly one of the two, also if the engine
dies. It refuses work that it could not hold (OverloadedError) and knows neither HTTP nor JSON.

Everything here belongs to the event loop. The engine belongs to its thread (`engine_thread.py`), `prepare` and
`token_text` excepted: they are pure, and the first runs in the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, TypeVar, cast

from model_core.analysis.compare import collect_answer
from model_core.errors import (
    DualVisionError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from model_core.types import Engine, EngineStats, GenerationRequest, ModelInfo, TokenEvent
from service.engine_thread import Abort, Add, EngineThread, Stop
from service.errors import DrainingError, NotReadyError, RequestTimeoutError, StalledError
from service.fleet import Fleet, Member
from service.logs import logger
from service.metrics import Metrics, RequestRecorder

State = Literal["new", "loading", "ready", "failed", "dead", "stopped"]
T = TypeVar("T")
K = TypeVar("K")

#: Tokens whose text is remembered: with log-probabilities every step asks for the same few again and again.
_NUM_TOKEN_TEXTS = 65_536


@dataclass(frozen=True, slots=True)
class EngineLimits:
    max_num_seqs: int = 16
    max_waiting: int = 64
    request_timeout_seconds: float = 600.0
    stall_timeout_seconds: float = 120.0
    shutdown_timeout_seconds: float = 30.0
    batch_window_seconds: float = 0.0
    preprocess_workers: int = 2


class EngineClient:
    """Owns the engine thread, the preprocess pool and the count of admitted requests."""

    def __init__(
        self,
        load: Callable[[], Engine],
        metrics: Metrics,
        limits: EngineLimits,
        *,
        on_load_failure: Callable[[BaseException], None] | None = None,
        on_pool_thread: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_pool_thread` is called once in each thread of the preprocess pool, before its first work."""
        self._metrics, self._limits, self._clock = metrics, limits, clock
        self._on_load_failure = on_load_failure
        self._state: State = "new"
        self._is_draining = False
        window = limits.batch_window_seconds
        self._thread = EngineThread(
            self, lambda: Fleet(load()), clock, max_batch=limits.max_num_seqs, window_seconds=window
        )
        self._pool = ThreadPoolExecutor(
            limits.preprocess_workers, thread_name_prefix="dve-prepare", initializer=on_pool_thread
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Fleet | None = None
        self._token_text: Callable[[int], tuple[str, list[int]]] | None = None
        self._streams: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._num_admitted = 0
        self.num_preparing = 0
        #: Called when a member's admitted request has ended, however it did.
        self.on_left: Callable[[Member], None] = lambda _: None
        self._idle = asyncio.Event()
        self._idle.set()
        self._settled = asyncio.Event()

    # Life

    def start(self) -> None:
        """Begin to load, in the engine's thread. Returns at once; `check_ready` tells when it is done."""
        self._loop = asyncio.get_running_loop()
        self._state = "loading"
        self._thread.start()

    async def wait_loaded(self) -> None:
        """Until loading has ended, well or badly."""
        await self._settled.wait()

    def begin_drain(self) -> None:
        """Refuse new work from now on. May be called from a signal handler."""
        self._is_draining = True

    async def stop(self) -> None:
        """Let running requests finish for the shutdown time, end the others with an error, join the thread."""
        self.begin_drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.shutdown_timeout_seconds):
                await self._idle.wait()
        self._end_all(DrainingError)
        if self._state != "new":
            self._thread.commands.put(Stop())
            # A thread inside a load or a long step can't be interrupted: it is a daemon, so leave it.
            await asyncio.to_thread(self._thread.join, 5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._state = "stopped"

    # What a probe asks

    @property
    def base(self) -> Member:
        return self._ready_engine().base

    @property
    def info(self) -> ModelInfo:
        return self._ready_engine().info

    @property
    def stats(self) -> EngineStats:
        return self._thread.stats

    @property
    def load_error(self) -> BaseException | None:
        return self._thread.load_error

    def check_ready(self) -> None:
        """Raises NotReadyError, EngineDeadError or DrainingError."""
        if self._is_draining and self._state != "dead":
            raise DrainingError("the server is shutting down")
        self._ready_engine()

    def check_live(self) -> None:
        """Raises EngineDeadError, or StalledError when work waits and nothing moves. Loading is alive."""
        if self._state in ("dead", "failed"):
            raise EngineDeadError("the engine has stopped", value=self._state)
        still_seconds = self._clock() - self._thread.progress_at
        if self._streams and still_seconds > self._limits.stall_timeout_seconds:
            raise StalledError("work waits and the engine does not move", value=f"{still_seconds:.0f} s")

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text and bytes. The list is shared: do not change it."""
        if self._token_text is None:
            raise NotReadyError("the model is not loaded", value=self._state)
        return self._token_text(token_id)

    def _ready_engine(self) -> Fleet:
        if self._state == "dead":
            raise EngineDeadError("the engine has stopped")
        if self._engine is None or self._state != "ready":
            raise NotReadyError("the model is not loaded", value=self._state)
        return self._engine

    # Work

    def check_room(self, num_places: int = 1) -> None:
        """Raises what `admit` would, so that a request can be refused before its body is read."""
        capacity = self._limits.max_num_seqs + self._limits.max_waiting
        try:
            self.check_ready()
            if num_places > capacity:
                raise InvalidRequestError(
                    "this server can't hold so many answers at once", value=num_places, allowed=f"at most {capacity}",
                    param="n",
                )  # fmt: skip
            if self._num_admitted + num_places > capacity:
                raise OverloadedError("the queue is full", value=self._num_admitted, allowed=f"{capacity} requests")
        except EngineError as error:
            self._metrics.admission_rejections.labels(error.code).inc()
            raise

    @contextmanager
    def admit(self, num_places: int = 1, member: Member | None = None) -> Iterator[Admission]:
        """Places for one request's sequences, counted before anything is decoded. Its deadline begins here.

        `member`: the model that answers; none: the base. Raises OverloadedError, NotReadyError, DrainingError,
        EngineDeadError; InvalidRequestError if so many places can never be had.
        """
        self.check_room(num_places)
        member = member or self.base
        self._num_admitted += num_places
        member.num_active += num_places
        self._idle.clear()
        try:
            yield Admission(self, member, asyncio.get_running_loop().time() + self._limits.request_timeout_seconds)
        finally:
            self._num_admitted -= num_places
            member.num_active -= num_places
            self.on_left(member)
            if self._num_admitted == 0:
                self._idle.set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Admit one request and run it."""
        with self.admit() as admission:
            async with aclosing(admission.generate(request)) as events:
                async for event in events:
                    yield event

    def _recorder(self, request: GenerationRequest, *, is_copy: bool) -> RequestRecorder:
        is_fused = request.arm == "fused" and request.score_token_ids is None
        return RequestRecorder(self._metrics, self._clock, is_fused=is_fused, is_copy=is_copy)

    def _submit(self, request_id: str, prepared: object, stream: asyncio.Queue[TokenEvent]) -> None:
        self._ready_engine()
        if request_id in self._streams:
            raise RequestFailedError("this request id is already running", value=request_id)
        if not self._streams:
            # An engine that had nothing to do was not standing still.
            self._thread.progress_at = self._clock()
        self._streams[request_id] = stream
        self._thread.commands.put(Add(request_id, prepared))

    def _leave(self, request_id: str, stream: asyncio.Queue[TokenEvent]) -> None:
        """The caller reads no more. After a terminal event there is nothing left to abort."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._thread.commands.put(Abort(request_id))

    # Called on the event loop by the engine thread, through `post`

    def post(self, function: Callable[..., None], *args: object) -> None:
        loop = self._loop
        # A closed loop has nobody waiting any more.
        with contextlib.suppress(RuntimeError):
            if loop is not None:
                loop.call_soon_threadsafe(function, *args)

    def on_loaded(self, engine: Engine) -> None:
        self._engine = cast(Fleet, engine)  # what the thread was given to load
        self._token_text = lru_cache(_NUM_TOKEN_TEXTS)(engine.token_text)
        self._metrics.set_models([engine.info])
        if self._state == "loading":
            self._state = "ready"
        logger.info("ready: %s on %s (%s)", engine.info.model_id, engine.info.device, engine.info.dtype)
        self._settled.set()

    def on_load_failure(self, error: BaseException) -> None:
        self._state = "failed"
        self._settled.set()
        if self._on_load_failure is not None:
            self._on_load_failure(error)

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self._metrics.observe_step(events)
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            if event.is_terminal:
                del self._streams[event.request_id]
            stream.put_nowait(event)

    def on_death(self) -> None:
        self._state = "dead"
        self._end_all(EngineDeadError)

    def _end_all(self, kind: type[DualVisionError]) -> None:
        for request_id in list(self._streams):
            # One error object each: raising one in many tasks would grow its traceback.
            self._streams.pop(request_id).put_nowait(TokenEvent(request_id, error=kind("the engine has stopped")))
            self._thread.commands.put(Abort(request_id))


class Admission:
    """One admitted request, or a family of them that shares a place and a deadline (a comparison)."""

    def __init__(self, client: EngineClient, member: Member, deadline: float) -> None:
        self._client, self.member, self._deadline = client, member, deadline
        self._fetch_seconds = 0.0

    async def wait(self, work: Awaitable[T]) -> T:
        """Await anything else within the request's time."""
        return await self._before_deadline(work)

    async def fetch(self, work: Awaitable[T]) -> T:
        """Await what the request needs from elsewhere; the time counts as the preprocessing of its first sequence."""
        client, begin = self._client, self._client._clock()
        client.num_preparing += 1
        try:
            return await self._before_deadline(work)
        finally:
            client.num_preparing -= 1
            self._fetch_seconds = client._clock() - begin
            client._metrics.preprocess_stages.labels("download").observe(self._fetch_seconds)

    async def in_pool(self, work: Callable[[], T]) -> T:
        """Run blocking work in the preprocess pool. A cancelled caller's work is not begun, or not awaited."""
        client = self._client
        client.num_preparing += 1
        try:
            return await self._before_deadline(asyncio.get_running_loop().run_in_executor(client._pool, work))
        finally:
            client.num_preparing -= 1

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events up to the terminal one, or the error that ended the request. Leaving early aborts it."""
        async with aclosing(self.generate_choices([request])) as events:
            async for event in events:
                yield event

    async def generate_choices(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[TokenEvent, None]:
        """Several answers to one prompt: events of all, each by its request's id, until every one has ended.

        The first error of any ends all, and so does leaving early. The first request goes ahead: once its prompt
        is computed, the others find it in the prefix cache instead of computing it beside it.
        """
        client = self._client
        recorders = {r.request_id: client._recorder(r, is_copy=i > 0) for i, r in enumerate(requests)}
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        failure: BaseException | None = None
        try:
            prepared = await self._prepare(requests[0])
            client._submit(requests[0].request_id, prepared, events)
            others = [(request.request_id, await self._fork(prepared, request)) for request in requests[1:]]
            while recorders:
                event = await self._before_deadline(events.get())
                recorder = recorders[event.request_id]
                recorder.observe(event)
                if event.error is not None:
                    raise self._in_time(event.error)
                if event.is_terminal:
                    recorders.pop(event.request_id).finish(None)
                while others:
                    client._submit(*others.pop(0), events)
                yield event
        except Exception as error:
            failure = error
            raise
        finally:
            for request in requests:
                client._leave(request.request_id, events)
            for recorder in recorders.values():
                recorder.finish(failure)

    async def _prepare(self, request: GenerationRequest) -> Any:
        return await self.in_pool(partial(self.member.prepare, self._until_deadline(request)))

    async def _fork(self, prepared: Any, request: GenerationRequest) -> Any:
        return await self.in_pool(partial(self.member.fork, prepared, self._until_deadline(request)))

    def _until_deadline(self, request: GenerationRequest) -> GenerationRequest:
        # The engine gets the deadline too: what has run out of time while it queued is not computed.
        left = max(self._deadline - asyncio.get_running_loop().time(), 0.0)
        spent, self._fetch_seconds = self._fetch_seconds, 0.0
        return replace(request, timeout_seconds=left, fetch_seconds=spent)

    def _in_time(self, error: DualVisionError) -> DualVisionError:
        """The engine may see the deadline pass before we do: then it is the same end by another name."""
        is_late = asyncio.get_running_loop().time() >= self._deadline
        return _late() if is_late and isinstance(error, RequestFailedError) else error

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

    async def _before_deadline(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await work
        except TimeoutError:
            raise _late() from None


def _late() -> RequestTimeoutError:
    return RequestTimeoutError("the request's time is over")
