"""The server's outer edge: one connection's bytes, how long they may take, and what no parser lets through.

In: bytes of a connection. Out: requests for the application below, or an answer in the shape of every other error and
a close. It is uvicorn's protocol over llhttp, made strict: uvicorn waits for ever for headers, for the rest of a body
that nobody reads, and for a client that reads nothing. It refuses pipelining (a request that comes before the answer
to the one before is ignored, and the connection closed after that answer), upgrades, and every second way to say how
long a body is. It knows no route; bodies that the application reads have their time limit in middleware.py.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from model_core.errors import DualVisionError
from service.errors import HeadersTooLargeError, InvalidHttpError, SlowClientError, error_json, rule_for
from service.security_headers import SECURITY_HEADERS


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """`head_seconds`: for a whole request head. `stall_seconds`: for a client to take what waits for it.
    `last_call_seconds`: for a request that is on its way when the server goes."""

    head_bytes: int = 96 * 1024  # 64 KB of request id get a new one, not a refusal
    head_seconds: float = 10.0
    stall_seconds: float = 30.0
    last_call_seconds: float = 0.2


_SECURITY = "".join(f"{name.decode()}: {value.decode()}\r\n" for name, value in SECURITY_HEADERS)

#: Called with the status of each answer that the edge itself gives.
Note = Callable[[int], None]


def protocol_class(limits: EdgeLimits, note: Note) -> type[EdgeProtocol]:
    """What uvicorn's `http` setting takes."""

    class Limited(EdgeProtocol):
        _limits, _note = limits, staticmethod(note)

    return Limited


class _RefusedError(Exception):
    """Leaves the parser; `EdgeProtocol._refusal` says why."""


class EdgeProtocol(HttpToolsProtocol):
    """One connection. Belongs to the event loop."""

    _limits = EdgeLimits()
    _note: Note

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._phase: Literal["head", "body"] = "head"
        self._has_begun = False
        self._num_parsed_bytes = 0
        self._num_unparsed_bytes = 0
        self._is_ignoring = self._is_last = False
        self._refusal: DualVisionError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # A client that never says a word has as long as one that says half.
        self._arm(self._limits.head_seconds, self._on_late_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_ignoring:
            return
        if self._phase == "head" and self._timer is None:
            self._arm(self._limits.head_seconds, self._on_late_head)
        had_begun = self._has_begun
        super().data_received(data)
        if had_begun and self._has_begun and not self._is_ignoring:
            # The parser keeps an unfinished line to itself, and all of this piece may belong to one.
            self._num_unparsed_bytes += len(data)
            if self._num_unparsed_bytes > self._limits.head_bytes:
                self._refuse(_too_large(self._limits))

    # The parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True
        self._num_parsed_bytes = self._num_unparsed_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase == "head":  # behind a chunked body come trailers, which nobody may take for headers
            super().on_header(name, value)
            self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._disarm()
        self._has_begun = False
        if self._is_busy():
            self._ignore_rest()
            return
        self._check_framing()
        super().on_headers_complete()
        self._phase = "body"
        if self._is_last:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self._is_ignoring:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._phase = "head"
        if not self._is_ignoring:
            self._disarm()
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        # What follows an upgrade is no HTTP to the parser; the answer is, and then the connection is over.
        self._ignore_rest()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  uvicorn's words are plain text
        if self._is_busy() and (self._phase == "head" or self.cycle.response_started):
            # Nonsense behind a good request: that one is answered, and nothing is written into its answer.
            self._ignore_rest()
        elif self._phase == "body" and not self._is_busy():
            self._close()  # in the rest of a request that has its answer
        else:
            self._refuse(self._refusal or _invalid("the request is not well-formed HTTP/1.1"))

    def _count(self, num_bytes: int) -> None:
        self._num_parsed_bytes += num_bytes
        if self._num_parsed_bytes > self._limits.head_bytes:
            self._refusal = _too_large(self._limits)
            raise _RefusedError

    def _check_framing(self) -> None:
        """What llhttp leaves open: the host, and codings that only some readers undo."""
        version = self.parser.get_http_version()
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if version not in ("1.0", "1.1"):
            self._refusal = _invalid("the protocol version is not supported")
        elif codings and (codings != [b"chunked"] or version == "1.0"):
            self._refusal = _invalid("the transfer-encoding is not supported")
        elif num_hosts > 1 or (version == "1.1" and num_hosts == 0):
            self._refusal = _invalid("the request needs exactly one host header")
        if self._refusal is not None:
            raise _RefusedError

    # Answers

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _ignore_rest(self) -> None:
        """Nothing that comes is looked at any more; the connection ends with the answer that is under way."""
        self._is_ignoring = True
        self._disarm()
        if self._is_busy():
            self.cycle.keep_alive = False
        else:
            self._close()

    def _refuse(self, error: DualVisionError) -> None:
        """Answer in the application's place, and close."""
        request_id, rule = uuid.uuid4().hex, rule_for(error)
        body = error_json(error, request_id)
        head = (
            f"HTTP/1.1 {rule.status} {HTTPStatus(rule.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\n{_SECURITY}connection: close\r\n\r\n"
        )
        self._is_ignoring = True
        self._disarm()
        if self._is_busy():
            # It reads a body that will never be whole. What it still sends is dropped.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(head.encode("ascii") + body)
        self._note(rule.status)
        self._close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or self._is_ignoring:
            self._close()
        elif self._phase == "body":
            # Answered before its body had come, and the rest is thrown away; not for ever.
            self._arm(self._limits.head_seconds, self._close)

    def shutdown(self) -> None:
        """Not closed at once where nothing is under way, as uvicorn does: a request may be, and gets its 503."""
        self._is_last = True
        if self._is_busy():
            self.cycle.keep_alive = False
        else:
            self._arm(self._limits.last_call_seconds, self._close)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    # Time

    def _arm(self, seconds: float, then: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_late_head(self) -> None:
        self._timer = None
        if self._is_busy():
            self._ignore_rest()
        elif not self._has_begun:
            self._close()
        else:
            allowed = f"{self._limits.head_seconds} s"
            what = "the request's headers did not come in time"
            self._refuse(SlowClientError(what, allowed=allowed, fix="Send them at once"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None and not self.transport.is_closing():
            self._stall_timer.cancel()
            self._stall_timer = None

    def _close(self) -> None:
        self.transport.close()
        self._bound_flush()

    def _bound_flush(self) -> None:
        """A closed transport still waits until the client has taken everything."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size() > 0:
            self._watch_stall()

    def _watch_stall(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self._limits.stall_seconds, self.transport.abort)


def _invalid(what: str) -> InvalidHttpError:
    return InvalidHttpError(what, fix="Send what RFC 9112 asks for")


def _too_large(limits: EdgeLimits) -> HeadersTooLargeError:
    allowed, fix = f"{limits.head_bytes} bytes in all", "Send fewer or shorter headers"
    return HeadersTooLargeError("the request's headers are too large", allowed=allowed, fix=fix)
