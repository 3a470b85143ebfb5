"""Which tracer a process has: none, unless the environment says where traces go.

In: whether they are wanted (settings.py reads the environment), and the process's name. Out: a `Tracer`. OpenTelemetry
is imported here and only then.
"""

from __future__ import annotations

from model_core.errors import ConfigError
from service.tracing.span import NoTracer, Tracer


def open_tracer(service_name: str, *, is_wanted: bool) -> Tracer:
    """Raises ConfigError where traces are wanted and the extra is not installed."""
    if not is_wanted:
        return NoTracer()
    try:
        from service.tracing.otel import OtelTracer  # noqa: PLC0415  an extra, and it takes a third of a second
    except ImportError:
        raise ConfigError(
            "the environment says where traces go, and OpenTelemetry is not installed",
            value="OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            allowed="the extra 'tracing', or neither variable",
            fix="pip install 'dual-vision-encoder[tracing]', or set OTEL_SDK_DISABLED=true",
        ) from None
    return OtelTracer.of_environment(service_name)
