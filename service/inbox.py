"""The events of one request on their way from the engine to whoever answers it.

In: events, one at a time, as the engine gives them. Out: all that have come, whenever the reader looks: a reader that
is late gets them together, and one that wants whole answers is woken once. It refuses to judge an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from model_core.types import TokenEvent


class Inbox:
    """One reader's. Belongs to the event loop.

    `is_patient`: the reader wants nothing before a terminal event. `on_event` is called at once for every event that
    is no error; `on_begin` once, at the first event of all.
    """

    def __init__(
        self, on_event: Callable[[TokenEvent], None], on_begin: Callable[[], None], *, is_patient: bool
    ) -> None:
        self._on_event, self._on_begin, self._is_patient = on_event, on_begin, is_patient
        self._events: list[TokenEvent] = []
        self._has_begun = False
        self._has_ended = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        if not self._has_begun:
            self._has_begun = True
            self._on_begin()
        if event.error is None:
            self._on_event(event)
        self._has_ended = self._has_ended or event.is_terminal
        if self._waiter is not None and not self._waiter.done() and (self._has_ended or not self._is_patient):
            self._waiter.set_result(None)

    async def take(self) -> list[TokenEvent]:
        """At least one event."""
        if not self._events or (self._is_patient and not self._has_ended):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events, self._has_ended = self._events, [], False
        return events
