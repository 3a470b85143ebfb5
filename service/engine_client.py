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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar, cast

from model_core.errors import (
    DualVisionError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from model_core.types import Engine, EngineStats, ModelInfo, TokenEvent
from service.admission import Admission
from service.deadline import Deadline
from service.engine_thread import Abort, Add, EngineThread, Stop
from service.errors import DrainingError, NotReadyError, StalledError
from service.fleet import Fleet, Member
from service.inbox import Inbox
from service.logs import logger
from service.metrics import Bridge, Metrics, State
from service.preparation import Preparation
from service.tracing.span import current_span

T = TypeVar("T")
K = TypeVar("K")

_ARRIVAL_SECONDS = 0.25
_LAST_WORDS_SECONDS = 0.3
_JOIN_SECONDS = 1.0

_WHEN_READY = "Retry when GET /health/ready answers 200"
_RESTART = "Look into the server's log for the cause, and restart it"

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
        self.metrics, self.clock = metrics, clock
        self._limits = limits
        self._on_load_failure = on_load_failure
        self._state: State = "new"
        self._is_draining = False
        window = limits.batch_window_seconds
        self._thread = EngineThread(
            self, lambda: Fleet(load()), clock, max_batch=limits.max_num_seqs, window_seconds=window
        )
        self.pool = ThreadPoolExecutor(
            limits.preprocess_workers, thread_name_prefix="dve-prepare", initializer=on_pool_thread
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Fleet | None = None
        self._token_text: Callable[[int], tuple[str, list[int]]] | None = None
        self._streams: dict[str, Inbox] = {}
        self._preparations: dict[Inbox, Preparation] = {}
        #: Of these, what has not reached the engine's thread; taken out by threads of the pool.
        self._preparing: set[str] = set()
        self._num_admitted = 0
        self._arrivals: set[object] = set()
        self._deadlines: set[Deadline] = set()
        self._drain_until = 0.0
        self._died_at: float | None = None
        self.num_busy = 0
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
        """Refuse new work from now on; what runs has the shutdown time. May be called from a signal handler."""
        if not self._is_draining:
            self._drain_until = self.clock() + self._limits.shutdown_timeout_seconds
            self._is_draining = True

    def cut_drain(self) -> None:
        """What still runs is over. May be called from a signal handler."""
        self.begin_drain()
        self._drain_until = min(self._drain_until, self.clock())

    def is_drained(self) -> bool:
        """Nobody is left. Those who are past the shutdown time are ended, and get a moment for their last words."""
        over_seconds = self.clock() - self._drain_until
        if self._is_draining and self._num_admitted and over_seconds >= 0:
            self._end_admitted()
        return self._is_draining and (self._num_admitted == 0 or over_seconds > _LAST_WORDS_SECONDS)

    async def stop(self) -> None:
        """Let running requests finish for the shutdown time, end the others with an error, join the thread."""
        self.begin_drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(self._drain_until - self.clock(), 0.0)):
                await self._idle.wait()
        is_loading = self._state == "loading"
        self._end_admitted()
        if self._state != "new":
            self._thread.commands.put(Stop())
            # A thread inside a load or a long step can't be interrupted: it is a daemon, so leave it.
            await asyncio.to_thread(self._thread.join, _LAST_WORDS_SECONDS if is_loading else _JOIN_SECONDS)
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._state = "stopped"

    def join_pool(self, seconds: float) -> bool:
        """After `stop`: whether all preprocessing has ended."""
        waiting = threading.Thread(target=self.pool.shutdown, daemon=True)
        waiting.start()
        waiting.join(seconds)
        return not waiting.is_alive()

    # What a probe asks

    @property
    def base(self) -> Member:
        return self.ready_engine().base

    @property
    def info(self) -> ModelInfo:
        return self.ready_engine().info

    @property
    def stats(self) -> EngineStats:
        return self._thread.stats

    @property
    def load_error(self) -> BaseException | None:
        return self._thread.load_error

    def check_ready(self) -> None:
        """Raises NotReadyError, EngineDeadError or DrainingError."""
        if self._is_draining and self._state != "dead":
            raise DrainingError("the server is shutting down", value="draining", allowed="ready", fix=_WHEN_READY)
        self.ready_engine()

    def check_live(self) -> None:
        """Raises EngineDeadError, or StalledError when work waits and nothing moves. Loading is alive."""
        if self._state in ("dead", "failed"):
            allowed = "loading or ready"
            raise EngineDeadError("the engine has stopped", value=self._state, allowed=allowed, fix=_RESTART)
        if self.stalled_seconds > self._limits.stall_timeout_seconds:
            raise StalledError(
                "work waits and the engine does not move", value=f"{self.stalled_seconds:.0f} s",
                allowed=f"{self._limits.stall_timeout_seconds:g} s", fix="Keep the server's log, then restart it",
            )  # fmt: skip

    @property
    def stalled_seconds(self) -> float:
        """Since the engine last moved, while somebody waits for it."""
        return max(self.clock() - self._thread.progress_at, 0.0) if self._streams else 0.0

    @property
    def dead_seconds(self) -> float:
        """Since the engine died; 0 while it lives."""
        return 0.0 if self._died_at is None else self.clock() - self._died_at

    def bridge(self) -> Bridge:
        """For a scrape."""
        num_open = len(self._streams)
        num_sent = max(num_open - len(self._preparing), 0)
        return Bridge(self._state, num_open, num_sent, self.num_preparing, self.stalled_seconds, self._thread.stats)

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text and bytes. The list is shared: do not change it."""
        if self._token_text is None:
            raise NotReadyError("the model is not loaded", value=self._state, allowed="ready", fix=_WHEN_READY)
        return self._token_text(token_id)

    def ready_engine(self) -> Fleet:
        if self._state == "dead":
            raise EngineDeadError("the engine has stopped", value=self._state, allowed="ready", fix=_RESTART)
        if self._engine is None or self._state != "ready":
            raise NotReadyError("the model is not loaded", value=self._state, allowed="ready", fix=_WHEN_READY)
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
                    fix="Lower 'n', or ask in several requests", param="n",
                )  # fmt: skip
            num_taken = self._num_admitted + len(self._arrivals)
            if num_taken + num_places > capacity:
                raise OverloadedError(
                    "the queue is full", value=num_taken, allowed=f"{capacity} requests",
                    fix="Retry shortly with fewer requests at once, or raise --max_waiting",
                )  # fmt: skip
        except EngineError as error:
            self.metrics.admission_rejections.labels(error.code).inc()
            raise

    @contextmanager
    def arrive(self) -> Iterator[Callable[[], None]]:
        """Keep one place for a request whose body is still to be read; what is given gives the place back, for `admit`.

        Without it a crowd would pass the first check together, and most of it be refused after all its bodies. Whoever
        has no body after a moment keeps no place: half a request must not take one from a whole one. Raises what
        `check_room` does.
        """
        self.check_room()
        place = object()
        self._arrivals.add(place)
        give_back = partial(self._arrivals.discard, place)
        timer = asyncio.get_running_loop().call_later(_ARRIVAL_SECONDS, give_back)
        try:
            yield give_back
        finally:
            timer.cancel()
            give_back()

    @contextmanager
    def admit(self, num_places: int = 1, member: Member | None = None) -> Iterator[Admission]:
        """Places for one request's sequences, counted before anything is decoded. Its deadline begins here.

        `member`: the model that answers; none: the base. Raises OverloadedError, NotReadyError, DrainingError,
        EngineDeadError; InvalidRequestError if so many places can never be had.
        """
        self.check_room(num_places)
        member = member or self.base
        deadline = Deadline(asyncio.get_running_loop().time() + self._limits.request_timeout_seconds)
        self._num_admitted += num_places
        member.num_active += num_places
        self._deadlines.add(deadline)
        self._idle.clear()
        current_span.get().since_begin("admission", time.monotonic())
        try:
            yield Admission(self, member, deadline)
        finally:
            deadline.close()
            self._deadlines.discard(deadline)
            self._num_admitted -= num_places
            member.num_active -= num_places
            self.on_left(member)
            if self._num_admitted == 0:
                self._idle.set()

    @property
    def num_preparing(self) -> int:
        """Requests whose pictures are fetched, decoded or patched now. May be read in any thread."""
        return self.num_busy + len(self._preparing)

    def prepare(self, request_id: str, work: Callable[[], object], stream: Inbox) -> None:
        """Prepare in the pool, and from there straight to the engine. An error comes as the stream's event."""
        self._open(request_id, stream)

        def on_done(prepared: object) -> None:
            self._thread.commands.put(Add(request_id, prepared))
            # Afterwards: between the two it would be neither on its way nor there, and others would start without it.
            self._preparing.discard(request_id)

        def on_error(error: BaseException) -> None:
            self._preparing.discard(request_id)
            self.post(self._fail, request_id, stream, error)

        preparation = self._preparations[stream] = Preparation(work, on_done, on_error)
        self._preparing.add(request_id)
        # Not at once: whoever comes in this turn of the loop is to be known as company before the engine is woken.
        asyncio.get_running_loop().call_soon(preparation.start, self.pool)

    def _fail(self, request_id: str, stream: Inbox, error: BaseException) -> None:
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            # Whatever it is, it is raised again where the request is answered.
            stream.put(TokenEvent(request_id, error=cast(DualVisionError, error)))

    def submit(self, request_id: str, prepared: object, stream: Inbox) -> None:
        self._open(request_id, stream)
        self._thread.commands.put(Add(request_id, prepared))

    def _open(self, request_id: str, stream: Inbox) -> None:
        self.ready_engine()
        if request_id in self._streams:
            raise RequestFailedError("this request id is already running", value=request_id)
        if not self._streams:
            # An engine that had nothing to do was not standing still.
            self._thread.progress_at = self.clock()
        self._streams[request_id] = stream

    def leave(self, request_id: str, stream: Inbox) -> None:
        """The caller reads no more. After a terminal event there is nothing left to abort."""
        if (preparation := self._preparations.pop(stream, None)) is not None:
            # Before the abort: either the engine has been given it, or never will be.
            preparation.cancel()
            self._preparing.discard(request_id)
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
        self.metrics.set_models([engine.info])
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
        self.metrics.observe_step(events)
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            if event.is_terminal:
                del self._streams[event.request_id]
            stream.put(event)

    def on_turn(self, before: EngineStats, after: EngineStats) -> None:
        self.metrics.observe_turn(before, after)

    def on_death(self) -> None:
        self._state, self._died_at = "dead", self.clock()
        self._end_all(EngineDeadError)

    def _end_admitted(self) -> None:
        for deadline in self._deadlines:
            deadline.end(partial(DrainingError, "the server is shutting down", fix=_WHEN_READY))

    def _end_all(self, kind: type[DualVisionError]) -> None:
        for request_id in list(self._streams):
            # One error object each: raising one in many tasks would grow its traceback.
            error = kind("the engine has stopped", fix=_RESTART)
            self._streams.pop(request_id).put(TokenEvent(request_id, error=error))
            self._thread.commands.put(Abort(request_id))
