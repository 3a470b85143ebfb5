"""What the HTTP layer itself costs: the whole application, its engine bridge and its pool, over an engine that is free.

    python -m benchmarks.api_overhead [--rounds 5] [--against CHECKOUT] [--requests 200] [--streams 64] [--tokens 1000]

First in one process, without a socket: what is timed is ours. Then through real sockets, the server kept to one core
and the client a process of its own. Bars: 2 ms at the median for a body of 200 KB with one picture, and 10,000 stream
events a second over 64 streams on one core. The picture is not decoded; that is the engine's `prepare`. The engine
gives `rate` tokens a second: one that ran ahead would have its events sent many at a time. CPU times are of all of
the server's threads: on a busy machine they alone mean something. Each round is a process of its own; with --against
(another checkout of this project, from the commit on that gave jobs settings of their own) the rounds alternate, and
the median of the rounds' ratios is shown beside both medians.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import math
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console
from rich.table import Table

from model_core.types import EngineStats, GenerationRequest, ModelInfo, TokenEvent, Usage
from service.engine_client import EngineClient
from service.main import build_app, engine_limits, open_socket, server_config
from service.settings import JobSettings, Settings

#: How to write a figure, by its unit.
_FORMATS = {"ms": "{:.2f} ms", "/s": "{:,.0f} /s"}


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured, how much, in which unit, and the bar."""

    what: str
    value: float
    unit: str
    bar: str = ""


INFO = ModelInfo(
    "free", "fp", "gated", True, ("qwen", "dinov2"), 1_000_000, device="cpu", dtype="float32", num_parameters=0
)


class FreeEngine:
    """One token a row a step, `max_tokens` of them, at no cost, and no faster than `rate` a second."""

    info = INFO

    def __init__(self, rate: float = math.inf) -> None:
        self._rate, self._due = rate, 0.0
        self._num_tokens = self._num_prompts = 0
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
        # Tokens too: what the service counts of a step is part of its cost.
        return EngineStats(
            num_running=len(self._left), num_generation_tokens=self._num_tokens, num_prompt_tokens=self._num_prompts
        )

    def step(self) -> list[TokenEvent]:
        time.sleep(max(self._due - time.perf_counter(), 0.0))
        self._due = time.perf_counter() + (len(self._left) - 1) / self._rate
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
            self._num_tokens += 1
            self._num_prompts += left == total
            events.append(TokenEvent(request_id, " word", (7,), fusion, reason, usage=usage))  # type: ignore[arg-type]
        return events


async def call(app: Any, body: bytes) -> tuple[int, int]:
    """One request through the application: its status and the number of its stream events."""
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
        count += message.get("body", b"").count(b"data: ")

    await app(scope, receive, send)
    return status, count


def chat_body(num_bytes: int, **more: object) -> bytes:
    data = base64.b64encode(b"\x89PNG".ljust(num_bytes * 3 // 4, b"\x5a")).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [image, {"type": "text", "text": "what is this?"}]
    return json.dumps({"model": "free", "messages": [{"role": "user", "content": content}], **more}).encode()


async def measure_requests(app: Any, count: int) -> tuple[list[float], float]:
    """Seconds of each of `count` requests, one after the other, and the CPU seconds of one."""
    body, seconds, cpu = chat_body(200_000, max_tokens=1), [], 0.0
    for i in range(count + 10):
        if i == 10:
            cpu = time.process_time()
        start = time.perf_counter()
        status, _ = await call(app, body)
        seconds.append(time.perf_counter() - start)
        if status != 200:
            raise SystemExit(f"the request was answered with {status}")
    return seconds[10:], (time.process_time() - cpu) / count


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


async def in_process(args: argparse.Namespace) -> list[Figure]:
    app, client = build(args)
    client.start()
    await client.wait_loaded()
    try:
        seconds, cpu = await measure_requests(app, args.requests)
        await measure_streams(app, args.streams, 20)
        per_wall, per_cpu = await measure_streams(app, args.streams, args.tokens)
    finally:
        await client.stop()
        app.state.parts.desk.store.close()
    seconds.sort()
    return [
        Figure("200 KB request, p50", statistics.median(seconds) * 1000, "ms", "2 ms"),
        Figure("200 KB request, p99", seconds[int(len(seconds) * 0.99)] * 1000, "ms"),
        Figure("200 KB request, CPU", cpu * 1000, "ms", "2 ms"),
        Figure(f"events, {args.streams} streams, wall", per_wall, "/s", "10,000 /s"),
        Figure(f"events, {args.streams} streams, CPU", per_cpu, "/s", "10,000 /s"),
    ]


def build(args: argparse.Namespace) -> tuple[Any, EngineClient]:
    data_dir = Path(tempfile.mkdtemp())  # without keys
    settings = Settings(max_num_seqs=args.streams, log_level="error", data_dir=data_dir)
    limits = replace(engine_limits(settings), batch_window_seconds=0.0)
    return build_app(settings, JobSettings(data_dir=data_dir), lambda: FreeEngine(args.rate), limits=limits)


async def through_sockets(args: argparse.Namespace) -> list[Figure]:
    """The server on this process's one core; the client process takes what it can get."""
    app, client = build(args)
    listening = open_socket("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await asyncio.sleep(0)
    while not server.started:
        await asyncio.sleep(0.01)
    await client.wait_loaded()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    port = listening.getsockname()[1]
    await asyncio.to_thread(load, port, args.streams, 20)
    cpu = time.process_time()
    events, seconds = await asyncio.to_thread(load, port, args.streams, args.tokens)
    cpu = time.process_time() - cpu
    server.should_exit = True
    await serving
    return [
        Figure(f"events, {args.streams} sockets, one core, wall", events / seconds, "/s", "10,000 /s"),
        Figure(f"events, {args.streams} sockets, one core, CPU", events / cpu, "/s", "10,000 /s"),
    ]


def load(port: int, streams: int, tokens: int) -> tuple[int, float]:
    """Events and seconds of a client process that reads so many streams at once."""
    command = [sys.executable, __file__, "--client", f"{port},{streams},{tokens}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    events, seconds = done.stdout.split()
    if int(events) < streams * tokens:
        raise SystemExit(f"a stream broke: {events} events")
    return int(events), float(seconds)


def read_streams(port: int, streams: int, tokens: int) -> tuple[int, float]:
    body = chat_body(400, max_tokens=tokens, stream=True)
    lines = ("POST /v1/chat/completions HTTP/1.1", "host: localhost", "content-type: application/json",
             "connection: close", f"content-length: {len(body)}", "", "")  # fmt: skip
    request = "\r\n".join(lines).encode() + body
    ready, events, begin = selectors.DefaultSelector(), 0, time.perf_counter()
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request)
        ready.register(connection, selectors.EVENT_READ)
    while ready.get_map():
        for key, _ in ready.select():
            connection = key.fileobj  # type: ignore[assignment]
            piece = connection.recv(65536)
            events += piece.count(b"data: ")
            if not piece:
                ready.unregister(connection)
                connection.close()
    return events, time.perf_counter() - begin


def measure(args: argparse.Namespace) -> list[Figure]:
    """One round, in this process."""
    logging.disable(logging.INFO)
    try:
        return [figure for part in (in_process, through_sockets) for figure in asyncio.run(part(args))]
    finally:
        logging.disable(logging.NOTSET)


def measure_in(checkout: Path, args: argparse.Namespace) -> list[Figure]:
    """One round of this very program over the service of a checkout."""
    loads = [f"--{name}={getattr(args, name)}" for name in ("requests", "streams", "tokens", "rate")]
    done = subprocess.run(
        [sys.executable, __file__, "--figures", *loads],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout.resolve())}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return [Figure(**figure) for figure in json.loads(done.stdout)]


def show(rounds: Sequence[list[Figure]], others: Sequence[list[Figure]]) -> None:
    """Medians over the rounds, and of the ratios within a round where there is something to compare with."""
    table = Table("what", "measured", *(("against", "ratio") if others else ()), "bar")
    for index, figure in enumerate(rounds[0]):
        own = [one[index].value for one in rounds]
        other = [one[index].value for one in others]
        ratios = [a / b for a, b in zip(own, other, strict=bool(others))] if others else []
        shown = [_FORMATS[figure.unit].format(statistics.median(values)) for values in (own, other) if values]
        if ratios:
            shown.append(f"{statistics.median(ratios):.2f}x")
        table.add_row(figure.what, *shown, figure.bar)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="their medians are shown (default: %(default)s)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="measure another checkout too, in alternation")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=12_800.0)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--figures", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.client:
        print(*read_streams(*map(int, args.client.split(","))))
    elif args.figures:
        print(json.dumps([asdict(figure) for figure in measure(args)]))
    else:
        own: list[list[Figure]] = []
        others: list[list[Figure]] = []
        for _ in range(args.rounds):
            own.append(measure_in(Path(__file__).parents[1], args))
            if args.against is not None:
                others.append(measure_in(args.against, args))
        show(own, others)


if __name__ == "__main__":
    main()
