"""A real OTLP/HTTP receiver on loopback: what arrives is parsed by OpenTelemetry's own protocol."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Receiver:
    """`spans`: all that came, each with its process's service name."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[tuple[str, object]] = []
        self.changed = threading.Condition()

    def take(self, body: bytes) -> None:
        told = ExportTraceServiceRequest.FromString(body)
        with self.changed:
            for resource in told.resource_spans:
                names = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
                self.spans += [(names[0], span) for scope in resource.scope_spans for span in scope.spans]
            self.changed.notify_all()

    def wait_for(self, *names: str) -> dict[str, tuple[str, object]]:
        """By name, once all of these have come."""
        with self.changed:
            assert self.changed.wait_for(lambda: {*names} <= {s.name for _, s in self.spans}, 30), self.names
            return {span.name: (service, span) for service, span in self.spans}

    @property
    def names(self) -> set[str]:
        return {span.name for _, span in self.spans}


@contextmanager
def run_receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            receiver.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing to say."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
