"""The tracer that records: OpenTelemetry's SDK, exported as OTLP over HTTP.

In: spans as `span.py` has them. Out: OpenTelemetry's, batched in the background. Where to, how many and under which
name are the SDK's own OTEL_* variables, which it reads by itself. The only file that imports it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as RawTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.tracing.span import TRACEPARENT, TRACESTATE, Kind, Value

_KINDS: Mapping[Kind, SpanKind] = {
    "server": SpanKind.SERVER, "consumer": SpanKind.CONSUMER, "internal": SpanKind.INTERNAL,
}  # fmt: skip
_PROPAGATOR = TraceContextTextMapPropagator()
_VALUE_CHARACTERS = 128
_CLOSE_MILLISECONDS = 3000


class OtelTracer:
    """`provider`: tests give one that keeps spans in memory."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer: RawTracer = provider.get_tracer("dual-vision-encoder")

    @classmethod
    def of_environment(cls, service_name: str) -> OtelTracer:
        """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over `service_name`."""
        resource = Resource.create({SERVICE_NAME: service_name}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def begin(
        self, name: str, kind: Kind, carrier: Mapping[str, str], *, start_unix: float | None = None
    ) -> RecordedSpan:
        told = {key: carrier[key] for key in (TRACEPARENT, TRACESTATE) if carrier.get(key)}
        clocks = time.time(), time.monotonic()
        begun = clocks[0] if start_unix is None else start_unix
        span = self._tracer.start_span(
            name, context=_PROPAGATOR.extract(told), kind=_KINDS[kind], start_time=_nanoseconds(begun)
        )
        return RecordedSpan(self._tracer, span, clocks, begun)

    def close(self) -> None:
        self._provider.force_flush(_CLOSE_MILLISECONDS)
        self._provider.shutdown()


class RecordedSpan:
    """`clocks`: the wall clock and the monotonic one, read together."""

    def __init__(self, tracer: RawTracer, span: OtelSpan, clocks: tuple[float, float], begun: float) -> None:
        self._tracer, self._span, self._begun = tracer, span, begun
        self._wall, self._monotonic = clocks
        self._context = set_span_in_context(span)
        self._has_failed = False

    @property
    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self._context)
        return carrier.get(TRACEPARENT, "")

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes(_bounded(attributes))

    def child(self, name: str, start: float, end: float, **attributes: Value) -> None:
        self._add(name, self._at(start), self._at(end), attributes)

    def since_begin(self, name: str, end: float, **attributes: Value) -> None:
        self._add(name, self._begun, self._at(end), attributes)

    def note(self, name: str, **attributes: Value) -> None:
        self._span.add_event(name, _bounded(attributes))

    def fail(self, code: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._span.set_status(Status(StatusCode.ERROR))
            self._span.set_attribute("error.type", code[:_VALUE_CHARACTERS])

    def end(self, name: str | None = None) -> None:
        if name is not None:
            self._span.update_name(name)
        self._span.end()

    def _add(self, name: str, start: float, end: float, attributes: Mapping[str, Value]) -> None:
        span = self._tracer.start_span(
            name, context=self._context, start_time=_nanoseconds(start), attributes=_bounded(attributes)
        )
        span.end(_nanoseconds(max(start, end)))

    def _at(self, monotonic: float) -> float:
        return self._wall + monotonic - self._monotonic


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _bounded(attributes: Mapping[str, Value]) -> dict[str, Value]:
    """Names are written with `__` for the dot that Python's keywords can't have."""
    return {
        name.replace("__", "."): value[:_VALUE_CHARACTERS] if isinstance(value, str) else value
        for name, value in attributes.items()
    }
