"""What the HTTP layer itself costs: the whole application, its engine bridge and its pool, over an engine that is free.

    python -m benchmarks.api_overhead [--requests 200] [--streams 64] [--tokens 400]

One process, no socket: what is timed is ours. Bars: 2 ms at the median for a body of 200 KB with one picture, and
10,000 stream events a second over 64 streams. The picture is not decoded; that is the engine's `prepare`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from model_core.types import EngineStats, GenerationRequest, ModelInfo, TokenEvent, Usage
from service.engine_client import EngineClient
from service.main import build_app
from service.settings import Settings

INFO = ModelInfo(
    "free", "fp", "gated", True, ("qwen", "dinov2"), 1_000_000, device="cpu", dtype="float32", num_parameters=0
)


class FreeEngine:
    """One token a row a step, `max_tokens` of them, at no cost."""

    info = INFO

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self._total: dict[str, int] = {}

    def prepare(self, request: GenerationRequest) -> GenerationRequest:
        return request

    def fork(self, prepared: GenerationRequest, request: GenerationRequest) -> GenerationRequest:
        del prepared
        return request

    def add_request(self, prepared: GenerationRequest) -> None:
        self._left[prepared.request_id] = self._total[prepared.request_id] = prepared.sampling.max_tokens

    def abort(self, request_id: str) -> None:
        self._left.pop(request_id, None)
        self._total.pop(request_id, None)

    def reset_caches(self) -> None: ...

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        return "x", [token_id]

    def has_work(self) -> bool:
        return bool(self._left)

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._left))

    def step(self) -> list[TokenEvent]:
        events = []
        for request_id, left in list(self._left.items()):
            total = self._total[request_id]
            usage = Usage(1, total) if left in (1, total) else None
            fusion = () if left == total else None
            if left == 1:
                self.abort(request_id)
            else:
                self._left[request_id] = left - 1
            reason = "length" if left == 1 else None
            events.append(TokenEvent(request_id, " word", (7,), fusion, reason, usage=usage))  # type: ignore[arg-type]
        return events


async def call(app: Any, body: bytes) -> tuple[int, int]:
    """One request through the application: its status and the number of non-empty body messages."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    has_sent, forever, status, count = False, asyncio.Event(), 0, 0

    async def receive() -> dict[str, Any]:
        nonlocal has_sent
        if has_sent:
            await forever.wait()
        has_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, count
        status = message.get("status", status)
        count += bool(message.get("body"))

    await app(scope, receive, send)
    return status, count


def chat_body(num_bytes: int, **more: object) -> bytes:
    data = base64.b64encode(b"\x89PNG".ljust(num_bytes * 3 // 4, b"\x5a")).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [image, {"type": "text", "text": "what is this?"}]
    return json.dumps({"model": "free", "messages": [{"role": "user", "content": content}], **more}).encode()


async def measure_requests(app: Any, count: int) -> list[float]:
    """Seconds of each of `count` requests, one after the other."""
    body, seconds = chat_body(200_000, max_tokens=1), []
    for _ in range(count + 10):
        start = time.perf_counter()
        status, _ = await call(app, body)
        seconds.append(time.perf_counter() - start)
        if status != 200:
            raise SystemExit(f"the request was answered with {status}")
    return seconds[10:]


async def measure_streams(app: Any, streams: int, tokens: int) -> tuple[float, float]:
    """Events a second of wall time and of this process's CPU time."""
    body = chat_body(400, max_tokens=tokens, stream=True)
    wall, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(call(app, body) for _ in range(streams)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    events = sum(count for _, count in answers)
    if {status for status, _ in answers} != {200} or events < streams * tokens:
        raise SystemExit(f"a stream broke: {events} events")
    return events / wall, events / cpu


async def run(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    with tempfile.TemporaryDirectory() as data_dir:  # without keys and jobs
        settings = Settings(
            max_num_seqs=args.streams, batch_window_seconds=0.0, log_level="error", data_dir=Path(data_dir)
        )
        app, client = build_app(settings, FreeEngine)
        engine_client: EngineClient = client
        engine_client.start()
        await engine_client.wait_loaded()
        try:
            seconds = sorted(await measure_requests(app, args.requests))
            await measure_streams(app, args.streams, 20)
            per_wall, per_cpu = await measure_streams(app, args.streams, args.tokens)
        finally:
            await engine_client.stop()
            app.state.parts.desk.store.close()
    return [
        ("200 KB request, p50", f"{statistics.median(seconds) * 1000:.2f} ms", "2 ms"),
        ("200 KB request, p99", f"{seconds[int(len(seconds) * 0.99)] * 1000:.2f} ms", ""),
        (f"stream events, {args.streams} streams, wall", f"{per_wall:,.0f} /s", "10,000 /s"),
        (f"stream events, {args.streams} streams, CPU", f"{per_cpu:,.0f} /s", "10,000 /s"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    table = Table("what", "measured", "bar")
    for row in asyncio.run(run(parser.parse_args(argv))):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
