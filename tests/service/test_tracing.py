"""Traces of requests: a client's trace is continued, every stage is a span, and no attribute is content."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from model_core.errors import ConfigError
from service.settings import wants_tracing
from service.tracing.choose import open_tracer
from service.tracing.otel import OtelTracer
from service.tracing.span import NoTracer, laid_out, valid_traceparent
from tests.service.conftest import LiveServer, ask, run_server
from tests.service.fakes import TIMINGS, FakeEngine
from tests.service.receiver import run_receiver

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TOLD = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
CHAT = "/v1/chat/completions"
#: Everything that a span may say. Names of this program, codes and counts: a new one is thought about here.
ATTRIBUTES = {
    "http.request.method", "http.route", "http.response.status_code", "error.type", "gen_ai.request.model",
    "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "dve.request_id", "dve.key_id", "dve.finish_reason",
    "dve.cached_tokens", "dve.vision_tokens", "dve.num_images", "dve.num_messages", "dve.encoder",
}  # fmt: skip


class Kept(InMemorySpanExporter):
    """Spans in memory, and whoever waits for one."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()

    def export(self, spans):
        with self.changed:
            self.changed.notify_all()
            return super().export(spans)


class Traced:
    def __init__(self, live: LiveServer, exporter: Kept) -> None:
        self.live, self.exporter = live, exporter

    def spans(self, route: str = f"POST {CHAT}") -> dict:
        """Of the one request, once its own span has ended, which is after all of its parts and its answer."""
        with self.exporter.changed:
            named = lambda: {span.name: span for span in self.exporter.get_finished_spans()}  # noqa: E731
            assert self.exporter.changed.wait_for(lambda: route in named(), 20), list(named())
            return named()


@pytest.fixture
def traced() -> Iterator[Traced]:
    exporter, provider = Kept(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with run_server(FakeEngine(), tracer=OtelTracer(provider)) as live:
        yield Traced(live, exporter)
    provider.shutdown()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_clients_trace_goes_on_through_every_stage(traced: Traced, is_stream: bool) -> None:
    body = ask("a secret question", images=2, stream=is_stream)
    assert traced.live.http.post(CHAT, json=body, headers=TOLD | {"x-request-id": "rid-1"}).status_code == 200
    spans = traced.spans()
    stages = ["admission", "prepare", "queue", "encode", "prefill", "decode"] + ["stream"] * is_stream
    root = spans.pop(f"POST {CHAT}")
    assert [name for name in stages if name not in spans] == []
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert root.kind.name == "SERVER" and root.context.trace_state.get("vendor") == "1"
    for name in stages:
        assert spans[name].parent.span_id == root.context.span_id, name
        assert root.start_time - 10**9 <= spans[name].start_time <= spans[name].end_time <= root.end_time, name
    order = [spans[name] for name in ("queue", "encode", "prefill", "decode")]
    assert all(a.end_time <= b.start_time + 1000 for a, b in itertools.pairwise(order)), "back to back"
    told = root.attributes
    assert (told["http.route"], told["http.response.status_code"], told["dve.request_id"]) == (CHAT, 200, "rid-1")
    assert (told["gen_ai.request.model"], told["dve.num_images"]) == ("fake/model:1", 2)
    assert told["gen_ai.usage.output_tokens"] == 4 and told["dve.finish_reason"] == "stop"


def test_the_encoders_time_is_told_of_each(traced: Traced) -> None:
    """Children of the request like the stages, within the time of encoding, as long as each took."""
    assert traced.live.chat(images=1).status_code == 200
    root, encode = (traced.spans()[name] for name in (f"POST {CHAT}", "encode"))
    found = [span for span in traced.exporter.get_finished_spans() if span.name == "encoder"]
    seconds = {span.attributes["dve.encoder"]: (span.end_time - span.start_time) / 1e9 for span in found}
    assert seconds == pytest.approx(TIMINGS.encoder_seconds, abs=1e-6) and len(found) == len(seconds) == 2
    for span in found:
        assert span.parent.span_id == root.context.span_id
        assert encode.start_time <= span.start_time <= span.end_time <= encode.end_time


def test_no_attribute_is_content_or_unbounded(traced: Traced) -> None:
    traced.live.http.post(CHAT, json=ask("a secret question", images=1, user="somebody"))
    traced.live.http.post("/secret/" + "x" * 500, json={})
    traced.spans("POST unmatched")
    for span in traced.exporter.get_finished_spans():
        assert set(span.attributes) <= ATTRIBUTES, span.name
        text = f"{span.name} {dict(span.attributes)} {[dict(e.attributes) for e in span.events]}"
        for untold in ("secret", "somebody", "red fox", "iVBOR"):
            assert untold not in text
        assert all(len(value) <= 128 for value in span.attributes.values() if isinstance(value, str))


def test_what_fails_is_marked_with_its_code(traced: Traced) -> None:
    assert traced.live.chat("break").status_code == 500
    root = traced.spans()[f"POST {CHAT}"]
    assert (root.status.status_code.name, root.attributes["error.type"]) == ("ERROR", "request_failed")


def test_probes_and_scrapes_are_not_traced(traced: Traced) -> None:
    for path in ("/health/ready", "/metrics"):
        assert traced.live.http.get(path).status_code == 200
    traced.live.http.get("/v1/models")
    assert set(traced.spans("GET /v1/models")) == {"GET /v1/models"}


def test_an_endpoint_in_the_environment_gets_them_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    with run_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        tracer = open_tracer("dve-server", is_wanted=wants_tracing())
        with run_server(FakeEngine(), tracer=tracer) as live:
            assert live.chat(images=1).status_code == 200
        tracer.close()
        found = receiver.wait_for(f"POST {CHAT}", "admission", "prefill", "decode")
    assert {service for service, _ in found.values()} == {"dve-server"}


def test_without_an_endpoint_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_tracing()
    assert isinstance(open_tracer("x", is_wanted=False), NoTracer)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4318/v1/traces")
    assert wants_tracing()
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as more:
            more.setenv(name, value)
            assert not wants_tracing()
    for name, value in (("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_TRACES_EXPORTER", "zipkin")):
        with monkeypatch.context() as more:
            more.setenv(name, value)
            with pytest.raises(ConfigError, match=name):
                wants_tracing()


def test_an_endpoint_without_the_extra_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "service.tracing.otel"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"dual-vision-encoder\[tracing\]"):
        open_tracer("x", is_wanted=True)


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        (TOLD["traceparent"], True),
        (f"01-{TRACE}-{PARENT}-01-more", True),  # a later version's further fields
        (f"00-{TRACE}-{PARENT}-01-more", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        ("", False),
        ("\n" + TOLD["traceparent"], False),
    ],
)
def test_a_traceparent_is_read_as_the_standard_has_it(text: str, is_valid: bool) -> None:
    assert bool(valid_traceparent(text)) is is_valid
    span = NoTracer().begin("x", "server", {"traceparent": text})
    assert span.trace_id == (TRACE if is_valid else "")


def test_durations_are_laid_back_to_back() -> None:
    assert laid_out([("a", 1.0), ("b", 0.0), ("c", 2.0)], 10.0) == [("a", 7.0, 8.0), ("c", 8.0, 10.0)]
