"""Server-sent events, and leaving when the client has left.

In: frames of JSON. Out: bytes on the wire, `data: [DONE]` at a good end. An error after the first byte is
a frame `data: {"error": ...}` and a close without `[DONE]`. It refuses to hold a frame back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model_core.errors import DualVisionError
from service.errors import ClientDisconnectedError, error_json
from service.logs import log_failure

T = TypeVar("T")

_STALLED_CLIENT_SECONDS = 30.0


def to_frame(data: Mapping[str, Any]) -> bytes:
    # json.dumps escapes line breaks and non-ASCII, so a frame is always one line of bytes.
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result, or ClientDisconnectedError and the work cancelled. The body must have been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError("the client closed the connection")
    finally:
        await _cancel(task, watch)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    # Awaited, so that what they hold (a place in the queue) is free when we return.
    await asyncio.gather(*tasks, return_exceptions=True)


class SseResponse(Response):
    """Streams frames until they end, the client leaves, or a send stalls. Always calls `close`.

    `close` is separate from the generator: closing a generator that was never begun runs none of its code.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        *,
        request_id: str,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        # Response() counted an empty body.
        del self.headers["content-length"]
        self._frames, self._close, self._request_id = frames, close, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        watch = asyncio.ensure_future(_disconnect(receive))
        pump = asyncio.ensure_future(self._pump(send))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            await _cancel(pump, watch)
            await self._frames.aclose()
            await self._close()

    async def _pump(self, send: Send) -> None:
        # A client that stopped reading, or left while we wrote: nobody is there to be told.
        with contextlib.suppress(TimeoutError, OSError):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for frame in self._until_error():
                async with asyncio.timeout(_STALLED_CLIENT_SECONDS):
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _until_error(self) -> AsyncGenerator[bytes, None]:
        try:
            async for frame in self._frames:
                yield frame
        except Exception as error:  # noqa: BLE001  the last-resort handler, once a response has begun
            if not isinstance(error, DualVisionError):
                log_failure("a stream broke", error)
            yield b"data: " + error_json(error, self._request_id) + b"\n\n"
            return
        yield b"data: [DONE]\n\n"
