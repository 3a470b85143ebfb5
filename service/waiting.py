"""The bytes of request bodies that wait for the engine, under one cap for the whole server.

In: bytes as they come in. Out: a refusal (OverloadedError) when all bodies together would exceed the cap. It
refuses to hold a body, and counts what has come, not what was announced: a client that announces much and
sends nothing takes no room from anyone.
"""

from __future__ import annotations

from model_core.errors import OverloadedError


class WaitingBytes:
    """The count of one app. Belongs to the event loop; no locks."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def check(self, num_more: int) -> None:
        """Raises OverloadedError if so many more bytes have no room now."""
        if self.num_bytes + num_more > self._max_bytes:
            raise OverloadedError(
                "the bodies of waiting requests fill their room",
                value=f"{self.num_bytes} bytes and {num_more} more",
                allowed=f"{self._max_bytes} bytes",
                fix="Retry shortly, or send fewer or smaller pictures",
            )


class WaitingBody:
    """One request's share. `release` may be called early, when the engine has begun, and more than once."""

    def __init__(self, waiting: WaitingBytes) -> None:
        self._waiting = waiting
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises OverloadedError, and keeps what was counted before."""
        self._waiting.check(num_bytes)
        self._waiting.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def release(self) -> None:
        self._waiting.num_bytes -= self._num_bytes
        self._num_bytes = 0
