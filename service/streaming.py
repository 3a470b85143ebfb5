"""Server-sent events, and leaving when the client has left.

In: pieces of one or more frames, the last of which ends with `DONE`. Out: bytes on the wire, one write a piece. An
error after the first byte is a frame `data: {"error": ...}` and a close without `[DONE]`. It refuses to hold
a piece back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model_core.errors import DualVisionError
from service.errors import ClientDisconnectedError, error_json
from service.logs import log_failure

T = TypeVar("T")

#: The last frame of every good stream.
DONE = b"data: [DONE]\n\n"

_STALLED_CLIENT_SECONDS = 30.0


def to_frame(data: Mapping[str, Any]) -> bytes:
    # json.dumps escapes line breaks and non-ASCII, so a frame is always one line of bytes.
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result, or ClientDisconnectedError and the work cancelled. The body must have been read."""
    # In the caller's own task: another one, and waiting for both, would be four more turns of the event loop.
    caller, has_left = cast("asyncio.Task[Any]", asyncio.current_task()), False

    async def watch() -> None:
        nonlocal has_left
        await _disconnect(request.receive)
        has_left = True
        caller.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        # Cancelled by somebody else as well, it is more than a client that left.
        if has_left and caller.cancelling() == 1:
            raise ClientDisconnectedError("the client closed the connection") from None
        raise
    finally:
        watching.cancel()
        if has_left:
            caller.uncancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    # Awaited, so that what they hold (a place in the queue) is free when we return.
    await asyncio.gather(*tasks, return_exceptions=True)


class SseResponse(Response):
    """Streams pieces until they end, the client leaves, or a send stalls. Always calls `close`.

    `close` is separate from the generator: closing a generator that was never begun runs none of its code.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        *,
        request_id: str,
        headers: Mapping[str, str],
        stall_seconds: float = _STALLED_CLIENT_SECONDS,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        # Response() counted an empty body.
        del self.headers["content-length"]
        self._pieces, self._close, self._request_id = pieces, close, request_id
        self._stall_seconds = stall_seconds
        self._num_sent, self._is_sending = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        watch = asyncio.ensure_future(_disconnect(receive))
        pump = asyncio.ensure_future(self._pump(send))
        try:
            while not await self._is_over(pump, watch):
                pass
            if pump.done():
                pump.result()
        finally:
            await _cancel(pump, watch)
            await self._pieces.aclose()
            await self._close()

    async def _is_over(self, *tasks: asyncio.Future[None]) -> bool:
        """Looks again after the stall time: a timer for each piece would cost more than the piece."""
        before = self._num_sent if self._is_sending else None
        done, _ = await asyncio.wait(tasks, timeout=self._stall_seconds, return_when=asyncio.FIRST_COMPLETED)
        return bool(done) or (self._is_sending and self._num_sent == before)

    async def _pump(self, send: Send) -> None:
        # A client that left while we wrote: nobody is there to be told.
        with contextlib.suppress(OSError):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for piece in self._pieces:
                    await self._send(send, piece)
            except Exception as error:  # noqa: BLE001  the last-resort handler, once a response has begun
                if not isinstance(error, DualVisionError):
                    log_failure("a stream broke", error)
                frame = b"data: " + error_json(error, self._request_id) + b"\n\n"
                await send({"type": "http.response.body", "body": frame, "more_body": False})

    async def _send(self, send: Send, piece: bytes) -> None:
        self._is_sending = True
        await send({"type": "http.response.body", "body": piece, "more_body": not piece.endswith(DONE)})
        self._is_sending = False
        self._num_sent += 1
