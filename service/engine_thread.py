"""The one thread that touches the engine: it loads it, turns it, and carries out what the event loop asks for.

In: commands, taken between two steps. Out: token events and snapshots, posted to its host on the event loop.
It refuses to know asyncio, requests' deadlines or who waits for an event.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from model_core.errors import DualVisionError, RequestFailedError
from model_core.types import Engine, EngineStats, TokenEvent
from service.logs import log_failure, log_load_failure


@dataclass(frozen=True, slots=True)
class Add:
    """`prepared` is what `Engine.prepare` gave for this request."""

    request_id: str
    prepared: object


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = Add | Abort | Stop


class EngineHost(Protocol):
    """Whom the thread reports to. `post` and `on_turn` are called by the thread, the rest through `post`."""

    @property
    def num_preparing(self) -> int:
        """Requests on their way to the engine."""

    def post(self, function: Callable[..., None], *args: object) -> None: ...

    def on_turn(self, before: EngineStats, after: EngineStats) -> None:
        """The engine's counts before a step and after it."""

    def on_loaded(self, engine: Engine) -> None: ...

    def on_load_failure(self, error: BaseException) -> None: ...

    def on_events(self, events: Sequence[TokenEvent]) -> None: ...

    def on_death(self) -> None: ...


class EngineThread(threading.Thread):
    """Loads the engine and turns it. The loading thread is the turning one: CUDA contexts like that.

    `stats`, `progress_at` and `load_error` are plain attributes that it writes and the event loop reads. An idle
    engine that was given work waits up to `window_seconds` for company that is on its way, or until it has
    `max_batch` commands.
    """

    def __init__(
        self,
        host: EngineHost,
        load: Callable[[], Engine],
        clock: Callable[[], float],
        *,
        max_batch: int,
        window_seconds: float,
    ) -> None:
        super().__init__(name="dve-engine", daemon=True)
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.stats = EngineStats()
        self.progress_at = clock()
        self.load_error: BaseException | None = None
        self._host, self._load, self._clock = host, load, clock
        self._max_batch, self._window_seconds = max_batch, window_seconds
        self._unfinished: set[str] = set()

    def run(self) -> None:
        try:
            engine = self._load()
        except Exception as error:  # noqa: BLE001  the engine loop's border; the composition root gives up
            self.load_error = error
            log_load_failure(error)
            self._host.post(self._host.on_load_failure, error)
            return
        self._host.post(self._host.on_loaded, engine)
        try:
            self.stats = engine.stats()  # what it did to warm up is nobody's
            while self._turn(engine):
                pass
        except Exception as error:  # noqa: BLE001  the engine loop's border: everyone waiting gets an answer
            log_failure("the engine died", error)
            self._host.post(self._host.on_death)

    def _turn(self, engine: Engine) -> bool:
        for command in self._take_commands(engine):
            if isinstance(command, Stop):
                return False
            self._carry_out(engine, command)
        events: list[TokenEvent] = []
        if engine.has_work():
            events = engine.step()
        self._unfinished.difference_update(event.request_id for event in events if event.is_terminal)
        if self._unfinished and not engine.has_work():
            # An engine that forgot a request must not leave its client waiting.
            events = [*events, *self._lost_events()]
        before, self.stats = self.stats, engine.stats()
        self._host.on_turn(before, self.stats)
        self.progress_at = self._clock()
        if events:
            self._host.post(self._host.on_events, events)
        return True

    def _take_commands(self, engine: Engine) -> list[Command]:
        """All that are there: an abort must not wait behind a step for its turn."""
        is_idle = not engine.has_work()
        taken = [self.commands.get()] if is_idle else []
        closes_at = self._clock() + self._window_seconds
        while True:
            # The window is for company that is on its way; alone, a request is not kept waiting.
            may_wait = is_idle and len(taken) < self._max_batch and self._host.num_preparing > 0
            left = closes_at - self._clock() if may_wait else 0.0
            try:
                taken.append(self.commands.get(timeout=left) if left > 0 else self.commands.get_nowait())
            except queue.Empty:
                return taken

    def _carry_out(self, engine: Engine, command: Add | Abort) -> None:
        if isinstance(command, Abort):
            self._unfinished.discard(command.request_id)
            engine.abort(command.request_id)
            return
        try:
            engine.add_request(command.prepared)
        except Exception as error:  # noqa: BLE001  the engine loop's border: one request's fault is its own
            failure = error if isinstance(error, DualVisionError) else RequestFailedError("the engine refused it")
            if failure is not error:
                log_failure("the engine refused a request", error)
            self._host.post(self._host.on_events, [TokenEvent(command.request_id, error=failure)])
            return
        self._unfinished.add(command.request_id)

    def _lost_events(self) -> list[TokenEvent]:
        lost, self._unfinished = self._unfinished, set()
        return [TokenEvent(request_id, error=RequestFailedError("the engine lost it")) for request_id in sorted(lost)]
