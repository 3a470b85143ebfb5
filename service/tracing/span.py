"""Spans as the service sees them, and the tracer that records nothing.

In: names, times of `time.monotonic`, attributes. Out: nothing, or what a real tracer makes of them. A client's W3C
traceparent is carried on also where nothing is recorded: it stands in the log and goes with a job to its worker. It
knows no OpenTelemetry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Literal, Protocol

#: W3C Trace Context, section 3.2: version, trace id, parent id, flags. Later versions may append fields.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

Kind = Literal["server", "consumer", "internal"]
Value = str | int | float | bool


class Span(Protocol):
    """One piece of work under way. Its methods may be called from any thread.

    traceparent: what a further process continues; "" where there is nothing to continue. trace_id: of the log's lines.
    """

    @property
    def traceparent(self) -> str: ...

    @property
    def trace_id(self) -> str: ...

    def set(self, **attributes: Value) -> None: ...

    def child(self, name: str, start: float, end: float, **attributes: Value) -> None:
        """A part that is over."""

    def since_begin(self, name: str, end: float, **attributes: Value) -> None:
        """A part that is over and began with the span itself."""

    def note(self, name: str, **attributes: Value) -> None:
        """Something that happened now."""

    def fail(self, code: str) -> None:
        """It ended badly; the first code counts."""

    def end(self, name: str | None = None) -> None:
        """`name`: a better one than it began with."""


class Tracer(Protocol):
    def begin(self, name: str, kind: Kind, carrier: Mapping[str, str], *, start_unix: float | None = None) -> Span:
        """carrier: `traceparent` and `tracestate` of whoever asked, where there are any."""

    def close(self) -> None:
        """Send what is recorded and not sent yet; waits a few seconds at most."""


class SilentSpan:
    """Records nothing, and passes on what it was given."""

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent
        self.trace_id = traceparent[3:35]

    def set(self, **attributes: Value) -> None: ...

    def child(self, name: str, start: float, end: float, **attributes: Value) -> None: ...

    def since_begin(self, name: str, end: float, **attributes: Value) -> None: ...

    def note(self, name: str, **attributes: Value) -> None: ...

    def fail(self, code: str) -> None: ...

    def end(self, name: str | None = None) -> None: ...


NO_SPAN = SilentSpan()


class NoTracer:
    """Where tracing is off."""

    def begin(self, name: str, kind: Kind, carrier: Mapping[str, str], *, start_unix: float | None = None) -> Span:  # noqa: ARG002
        told = valid_traceparent(carrier.get(TRACEPARENT, ""))
        return SilentSpan(told) if told else NO_SPAN

    def close(self) -> None: ...


#: The span of the request or the job that the current task works on.
current_span: ContextVar[Span] = ContextVar("dve_span", default=NO_SPAN)


def valid_traceparent(text: str) -> str:
    """The header's value if it is one, else ""."""
    found = _TRACEPARENT.fullmatch(text)
    if found is None or found[1] == "ff" or not found[2].strip("0") or not found[3].strip("0"):
        return ""
    if found[1] == "00" and found[5]:
        return ""
    return text[:55]


def laid_out(parts: Sequence[tuple[str, float]], end: float) -> list[tuple[str, float, float]]:
    """Durations of parts that followed each other up to `end`, as (name, start, end), without those of no length."""
    start = end - sum(seconds for _, seconds in parts)
    placed = []
    for name, seconds in parts:
        if seconds > 0:
            placed.append((name, start, start + seconds))
        start += seconds
    return placed
