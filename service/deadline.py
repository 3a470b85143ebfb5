"""When one admitted request must be over: at its deadline, or sooner if the server says so.

In: awaitables, and the inboxes that a request reads its events from. Out: their results, or the error that ended the
request, in place of whatever it waits for. One timer a request, not one for each event. It knows no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from model_core.errors import DualVisionError
from model_core.types import TokenEvent
from service.errors import RequestTimeoutError
from service.inbox import Inbox

T = TypeVar("T")


class Deadline:
    """Of one request. Belongs to the event loop; `close` it when the request has ended."""

    def __init__(self, at: float) -> None:
        """`at`: in the event loop's time."""
        self._loop = asyncio.get_running_loop()
        self.at = at
        self._make_error: Callable[[], DualVisionError] | None = None
        self._works: set[asyncio.Future[object]] = set()
        self._inboxes: dict[Inbox, str] = {}
        self._timer = self._loop.call_at(at, self.end, late)

    @property
    def is_past(self) -> bool:
        return self._loop.time() >= self.at

    @property
    def is_over(self) -> bool:
        """`end` was called: by the timer, or because the server goes."""
        return self._make_error is not None

    def end(self, make_error: Callable[[], DualVisionError]) -> None:
        """The first call counts: what is awaited now raises the error, and what will be awaited too."""
        if self._make_error is not None:
            return
        self._make_error = make_error
        for work in self._works:
            work.cancel()
        for inbox, request_id in self._inboxes.items():
            inbox.put(TokenEvent(request_id, error=make_error()))

    def close(self) -> None:
        self._timer.cancel()

    async def bound(self, work: Awaitable[T]) -> T:
        """The work's result. Cancelling the caller cancels the work."""
        task: asyncio.Future[T] = asyncio.ensure_future(work)
        if self._make_error is not None:
            task.cancel()
        self._works.add(task)  # type: ignore[arg-type]
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._make_error is None or (caller is not None and caller.cancelling()):
                raise
            raise self._make_error() from None
        finally:
            self._works.discard(task)

    def watch(self, inbox: Inbox, request_id: str) -> None:
        """The end of the request will be an event of this inbox, under that id."""
        self._inboxes[inbox] = request_id
        if self._make_error is not None:
            inbox.put(TokenEvent(request_id, error=self._make_error()))

    def forget(self, inbox: Inbox) -> None:
        self._inboxes.pop(inbox, None)


def late() -> RequestTimeoutError:
    fix = "Ask for fewer tokens or send fewer pictures; whoever runs the server may raise --request_timeout_seconds"
    return RequestTimeoutError("the request's time is over", fix=fix)
