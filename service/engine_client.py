"""The bridge between asyncio and the synchronous `Engine`: one thread that loads it and turns it.

In: GenerationRequests, within an admission. Out: each request's TokenEvents as an async iterator that
ends after the terminal event or raises the request's error, exactly one of the two, also if the engine
dies. It refuses work that it could not hold (OverloadedError) and knows neither HTTP nor JSON.

Threads: everything here belongs to the event loop, but for `_EngineThread`, which alone touches the
engine (`prepare` excepted: it is pure and runs in the pool), and the few plain attributes that it writes
and the loop reads (`stats`, `progress_at`).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from model_core.analysis.compare import collect_answer
from model_core.errors import DualVisionError, EngineDeadError, OverloadedError, RequestFailedError
from model_core.types import Engine, EngineStats, GenerationRequest, ModelInfo, TokenEvent
from service.errors import DrainingError, NotReadyError, RequestTimeoutError, StalledError
from service.logs import log_failure, log_load_failure, logger
from service.metrics import Metrics, RequestRecorder

State = Literal["new", "loading", "ready", "failed", "dead", "stopped"]
T = TypeVar("T")
K = TypeVar("K")

#: More workers than two make each other slower (serving.md section 2).
_NUM_POOL_WORKERS = 2


@dataclass(frozen=True, slots=True)
class EngineLimits:
    max_num_seqs: int = 16
    max_waiting: int = 64
    request_timeout_seconds: float = 600.0
    stall_timeout_seconds: float = 120.0
    shutdown_timeout_seconds: float = 30.0
    batch_window_seconds: float = 0.0


class EngineClient:
    """Owns the engine thread, the preprocess pool and the count of admitted requests."""

    def __init__(
        self,
        load: Callable[[], Engine],
        metrics: Metrics,
        limits: EngineLimits,
        *,
        on_load_failure: Callable[[BaseException], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics, self._limits, self._clock = metrics, limits, clock
        self._on_load_failure = on_load_failure
        self._state: State = "new"
        self._is_draining = False
        self._thread = _EngineThread(self, load, limits, clock)
        self._pool = ThreadPoolExecutor(_NUM_POOL_WORKERS, thread_name_prefix="dve-prepare")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._streams: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._num_admitted = 0
        self.num_preparing = 0
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
            self._thread.commands.put(_Stop())
            # A thread inside a load or a long step can't be interrupted: it is a daemon, so leave it.
            await asyncio.to_thread(self._thread.join, 5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._state = "stopped"

    # What a probe asks

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

    def _ready_engine(self) -> Engine:
        if self._state == "dead":
            raise EngineDeadError("the engine has stopped")
        if self._engine is None or self._state != "ready":
            raise NotReadyError("the model is not loaded", value=self._state)
        return self._engine

    # Work

    @contextmanager
    def admit(self) -> Iterator[Admission]:
        """A place for one request, counted before anything is decoded. Its deadline begins here.

        Raises OverloadedError, NotReadyError, DrainingError, EngineDeadError.
        """
        try:
            self.check_ready()
            if self._num_admitted >= self._limits.max_num_seqs + self._limits.max_waiting:
                raise OverloadedError("the queue is full", value=self._num_admitted)
        except DualVisionError as error:
            self._metrics.admission_rejections.labels(error.code).inc()
            raise
        self._num_admitted += 1
        self._idle.clear()
        try:
            yield Admission(self, asyncio.get_running_loop().time() + self._limits.request_timeout_seconds)
        finally:
            self._num_admitted -= 1
            if self._num_admitted == 0:
                self._idle.set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Admit one request and run it."""
        with self.admit() as admission:
            async with aclosing(admission.generate(request)) as events:
                async for event in events:
                    yield event

    def _recorder(self, request: GenerationRequest) -> RequestRecorder:
        is_fused = request.arm == "fused" and request.score_token_ids is None
        return RequestRecorder(self._metrics, self._clock, is_fused=is_fused)

    def _submit(self, request_id: str, prepared: object) -> asyncio.Queue[TokenEvent]:
        self._ready_engine()
        if request_id in self._streams:
            raise RequestFailedError("this request id is already running", value=request_id)
        if not self._streams:
            # An engine that had nothing to do was not standing still.
            self._thread.progress_at = self._clock()
        stream: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._streams[request_id] = stream
        self._thread.commands.put(_Add(request_id, prepared))
        return stream

    def _leave(self, request_id: str, stream: asyncio.Queue[TokenEvent]) -> None:
        """The caller reads no more. After a terminal event there is nothing left to abort."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._thread.commands.put(_Abort(request_id))

    # Called on the event loop by the engine thread, through `post`

    def post(self, function: Callable[..., None], *args: object) -> None:
        loop = self._loop
        # A closed loop has nobody waiting any more.
        with contextlib.suppress(RuntimeError):
            if loop is not None:
                loop.call_soon_threadsafe(function, *args)

    def on_loaded(self, engine: Engine) -> None:
        self._engine = engine
        self._metrics.set_model(engine.info)
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
            self._thread.commands.put(_Abort(request_id))


class Admission:
    """One admitted request, or a family of them that shares a place and a deadline (a comparison)."""

    def __init__(self, client: EngineClient, deadline: float) -> None:
        self._client, self._deadline = client, deadline

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
        client = self._client
        recorder = client._recorder(request)
        failure: BaseException | None = None
        stream: asyncio.Queue[TokenEvent] | None = None
        try:
            engine = client._ready_engine()
            prepared: Any = await self.in_pool(lambda: engine.prepare(request))
            stream = client._submit(request.request_id, prepared)
            is_over = False
            while not is_over:
                event = await self._before_deadline(stream.get())
                recorder.observe(event)
                if event.error is not None:
                    raise event.error
                is_over = event.is_terminal
                yield event
        except Exception as error:
            failure = error
            raise
        finally:
            if stream is not None:
                client._leave(request.request_id, stream)
            recorder.finish(failure)

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
            raise RequestTimeoutError("the request's time is over") from None


@dataclass(frozen=True, slots=True)
class _Add:
    request_id: str
    prepared: object


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Add | _Abort | _Stop


class _EngineThread(threading.Thread):
    """Loads the engine and turns it. The loading thread is the turning one: CUDA contexts like that."""

    def __init__(
        self, client: EngineClient, load: Callable[[], Engine], limits: EngineLimits, clock: Callable[[], float]
    ) -> None:
        super().__init__(name="dve-engine", daemon=True)
        self.commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self.stats = EngineStats()
        self.progress_at = clock()
        self.load_error: BaseException | None = None
        self._client, self._load, self._limits, self._clock = client, load, limits, clock
        self._unfinished: set[str] = set()

    def run(self) -> None:
        try:
            engine = self._load()
        except Exception as error:  # noqa: BLE001  the engine loop's border; the composition root gives up
            self.load_error = error
            log_load_failure(error)
            self._client.post(self._client.on_load_failure, error)
            return
        self._client.post(self._client.on_loaded, engine)
        try:
            while self._turn(engine):
                pass
        except Exception as error:  # noqa: BLE001  the engine loop's border: everyone waiting gets an answer
            log_failure("the engine died", error)
            self._client.post(self._client.on_death)

    def _turn(self, engine: Engine) -> bool:
        for command in self._take_commands(engine):
            if isinstance(command, _Stop):
                return False
            self._carry_out(engine, command)
        events: list[TokenEvent] = []
        if engine.has_work():
            events = engine.step()
        self._unfinished.difference_update(event.request_id for event in events if event.is_terminal)
        if self._unfinished and not engine.has_work():
            # An engine that forgot a request must not leave its client waiting.
            events = [*events, *self._lost_events()]
        self.stats = engine.stats()
        self.progress_at = self._clock()
        if events:
            self._client.post(self._client.on_events, events)
        return True

    def _take_commands(self, engine: Engine) -> list[_Command]:
        is_idle = not engine.has_work()
        taken = [self.commands.get()] if is_idle else []
        closes_at = self._clock() + self._limits.batch_window_seconds
        while len(taken) < self._limits.max_num_seqs:
            # The window is for company that is on its way; alone, a request is not kept waiting.
            left = closes_at - self._clock() if is_idle and self._client.num_preparing else 0.0
            try:
                taken.append(self.commands.get(timeout=left) if left > 0 else self.commands.get_nowait())
            except queue.Empty:
                break
        return taken

    def _carry_out(self, engine: Engine, command: _Add | _Abort) -> None:
        if isinstance(command, _Abort):
            self._unfinished.discard(command.request_id)
            engine.abort(command.request_id)
            return
        try:
            engine.add_request(command.prepared)
        except Exception as error:  # noqa: BLE001  the engine loop's border: one request's fault is its own
            failure = error if isinstance(error, DualVisionError) else RequestFailedError("the engine refused it")
            if failure is not error:
                log_failure("the engine refused a request", error)
            self._client.post(self._client.on_events, [TokenEvent(command.request_id, error=failure)])
            return
        self._unfinished.add(command.request_id)

    def _lost_events(self) -> list[TokenEvent]:
        lost, self._unfinished = self._unfinished, set()
        return [TokenEvent(request_id, error=RequestFailedError("the engine lost it")) for request_id in sorted(lost)]
