"""Pure ASGI layers around every request: its id, its time, its size limit, its last resort.

In: ASGI. Out: ASGI with `x-request-id` and `server-timing`, one log line, one count and one span a request; no
exception passes. They refuse to read bodies (they only count bytes) and to log what is in them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_core.errors import DualVisionError, OverloadedError
from service.errors import RequestTooLargeError, SlowClientError, error_response
from service.logs import log_failure, log_fields, request_id_var, trace_id_var
from service.metrics import Metrics
from service.request_limits import RequestLimits
from service.security_headers import SECURITY_HEADERS
from service.tracing.span import NO_SPAN, TRACEPARENT, TRACESTATE, NoTracer, Span, Tracer, current_span
from service.waiting import WaitingBody, WaitingBytes

_VALID_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
#: A body of the largest size may take an hour and a half at this rate, and holds no place meanwhile.
_LEAST_BYTES_PER_SECOND = 8 * 1024
#: What a form has beside its file.
_FORM_BYTES = 64 * 1024
_STREAM = b"text/event-stream"
_QUIET_ROUTES = ("/health", "/health/live", "/health/ready", "/metrics")


class RequestScope:
    """Outermost: gives the request its ids and its span, times it, counts it, and makes a 500 of a stray exception."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        tracer: Tracer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._metrics, self._clock = app, metrics, clock
        self._tracer = tracer or NoTracer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = _header(scope, b"x-request-id")
        request_id = asked if _VALID_ID.fullmatch(asked) else uuid.uuid4().hex
        span = self._begin_span(scope)
        tokens = request_id_var.set(request_id), trace_id_var.set(span.trace_id), current_span.set(span)
        start, status, stream_at, asks_back = self._clock(), 0, 0.0, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, stream_at, asks_back
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = _completed(message.get("headers", ()), request_id, self._clock() - start)
                is_stream = any(name == b"content-type" and value.startswith(_STREAM) for name, value in headers)
                stream_at = time.monotonic() if is_stream else 0.0
                asks_back = status >= 400 and any(name == b"retry-after" for name, _ in headers)
                message["headers"] = headers
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # noqa: BLE001  the last-resort handler
            log_failure("a request broke", error)
            if status == 0:
                await error_response(error, request_id)(scope, receive, send_with_headers)
        finally:
            if stream_at:
                span.child("stream", stream_at, time.monotonic())
            self._end_span(span, scope, status, request_id)
            self._metrics.http_requests.labels(_route(scope), str(status), str(asks_back).lower()).inc()
            self._note(scope, status, self._clock() - start)
            request_id_var.reset(tokens[0])
            trace_id_var.reset(tokens[1])
            current_span.reset(tokens[2])

    def _begin_span(self, scope: Scope) -> Span:
        if scope["path"] in _QUIET_ROUTES:
            return NO_SPAN
        carrier = {name: _header(scope, name.encode()) for name in (TRACEPARENT, TRACESTATE)}
        return self._tracer.begin(scope["method"], "server", carrier)

    @staticmethod
    def _end_span(span: Span, scope: Scope, status: int, request_id: str) -> None:
        route = _route(scope)
        caller = scope.get("state", {}).get("caller")
        span.set(
            http__request__method=scope["method"], http__route=route, http__response__status_code=status,
            dve__request_id=request_id, dve__key_id="" if caller is None else caller.key_id,
        )  # fmt: skip
        if status >= 500:
            span.fail(str(status))
        span.end(f"{scope['method']} {route}")

    @staticmethod
    def _note(scope: Scope, status: int, seconds: float) -> None:
        route = _route(scope)
        state = scope.get("state", {})
        fields = dict(state.get("log_fields", {}))
        if (caller := state.get("caller")) is not None:
            fields["key_id"] = caller.key_id
        level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
        log_fields(
            level, "request", method=scope["method"], route=route, status=status, seconds=round(seconds, 4), **fields
        )


def _route(scope: Scope) -> str:
    """The template, never the path: paths are the client's and unbounded."""
    return getattr(scope.get("route"), "path", None) or "unmatched"


def _header(scope: Scope, wanted: bytes) -> str:
    """The first of this name; empty without one. Starlette's `Headers` would decode all of them."""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def _completed(headers: Iterable[tuple[bytes, bytes]], request_id: str, seconds: float) -> list[tuple[bytes, bytes]]:
    """A route's headers, and those that every answer has. Its own policy stands, its timings come first."""
    timing = b"total;dur=%.1f" % (seconds * 1000)
    given = list(headers)
    names = {name for name, _ in given}
    if b"server-timing" in names:
        timing = b", ".join([*(value for name, value in given if name == b"server-timing"), timing])
        given = [pair for pair in given if pair[0] != b"server-timing"]
    own = ((b"x-request-id", request_id.encode("latin-1")), (b"server-timing", timing))
    return [*given, *(pair for pair in SECURITY_HEADERS if pair[0] not in names), *own]


class BodyLimit:
    """Refuses a body over the limit (413), one that has no room beside those that wait (503), or a slow one (408).

    By its declared length at once, else as soon as too much has come. A request's bytes count until it ends or
    until its route releases them through `request.state.waiting_body`. A body may take `body_seconds`, and a second
    more for every `_LEAST_BYTES_PER_SECOND` that have come: whoever sends is waited for, whoever drips is not.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: RequestLimits,
        waiting: WaitingBytes,
        metrics: Metrics,
    ) -> None:
        self._app, self._max_body_bytes, self._waiting, self._metrics = app, limits.max_body_bytes, waiting, metrics
        self._max_upload_bytes = limits.max_upload_bytes + _FORM_BYTES
        self._body_seconds = limits.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A file goes to the disk as it comes: it has a limit of its own, and waits nowhere.
        is_upload = scope["method"] == "POST" and scope["path"] == "/v1/files"
        limit = self._max_upload_bytes if is_upload else self._max_body_bytes
        declared = _header(scope, b"content-length")[:20]
        try:
            if declared.isdecimal():
                _check_size(int(declared), limit, f"{declared} bytes")
                with self._counted():
                    self._waiting.check(0 if is_upload else int(declared))
        except DualVisionError as error:
            # The rest of the body is not read: the connection can't be used again.
            response = error_response(error, request_id_var.get(), {"connection": "close"})
            await response(scope, receive, send)
            return
        received, body, is_whole = 0, WaitingBody(self._waiting), False
        begin = asyncio.get_running_loop().time()

        async def receive_counted() -> Message:
            nonlocal received, is_whole
            if is_whole:
                return await receive()  # waits for the client to leave
            try:
                async with asyncio.timeout_at(begin + self._body_seconds + received / _LEAST_BYTES_PER_SECOND):
                    message = await receive()
            except TimeoutError:
                raise SlowClientError(
                    "the request body did not come in time", value=f"{received} bytes",
                    allowed=f"{self._body_seconds} s, and 1 s more for each {_LEAST_BYTES_PER_SECOND} bytes",
                    fix="Send it again without pauses, and smaller where the connection is slow",
                ) from None  # fmt: skip
            is_whole = not message.get("more_body", False)
            num_bytes = len(message.get("body", b""))
            received += num_bytes
            _check_size(received, limit, f"more than {limit} bytes")
            with self._counted():
                body.add(0 if is_upload else num_bytes)
            return message

        scope.setdefault("state", {})["waiting_body"] = body
        try:
            await self._app(scope, receive_counted, send)
        finally:
            body.release()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except OverloadedError as error:
            self._metrics.admission_rejections.labels(error.code).inc()
            raise


def _check_size(num_bytes: int, limit: int, seen: str) -> None:
    if num_bytes > limit:
        raise RequestTooLargeError(
            "the request body is too large", value=seen, allowed=f"at most {limit} bytes",
            fix="Send fewer or smaller pictures, or a smaller file",
        )  # fmt: skip
