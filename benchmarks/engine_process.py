"""A server whose engine lives in a process of its own: the other side of "thread or process" (DECISIONS.md).

    python -m benchmarks.engine_process --model FOLDER --port 8002

The same application as `dve serve`, with an engine behind a socket instead of one in a thread: `dve bench serve --url
http://127.0.0.1:8000 --against http://127.0.0.1:8002` then says what sharing an interpreter costs. Requests and events
cross as frames of JSON, pictures as bytes behind them; nothing is pickled. The engine's process decodes pictures in a
pool of its own, as large as the server's. Text and pictures, all arms, greedy or sampled: what a load needs. The rest
(log-probabilities, JSON answers, scores, variants) is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model_core.errors import DualVisionError, RequestFailedError
from model_core.types import (
    ChatMessage,
    Engine,
    EngineStats,
    FusionWeights,
    GenerationRequest,
    ImagePart,
    ModelInfo,
    SamplingParams,
    TextPart,
    Timings,
    TokenEvent,
    Usage,
)
from service.main import load_encoder, serve, use_one_torch_thread
from service.request_limits import RequestLimits
from service.settings import Settings, load_settings

_HEADER = struct.Struct("<II")  # bytes of JSON, bytes behind it
_REFUSED = "the engine in a process of its own is for measuring: it can't do this"


class Wire:
    """Frames over a socket. Several threads may send, one receives."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._reader = connected, connected.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: object, blob: bytes = b"") -> None:
        text = json.dumps(message, separators=(",", ":")).encode()
        with self._sending:
            self._socket.sendall(_HEADER.pack(len(text), len(blob)) + text + blob)

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def receive(self) -> tuple[Any, bytes]:
        """Raises EOFError: the other side has gone."""
        header = self._reader.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise EOFError
        num_text, num_blob = _HEADER.unpack(header)
        return json.loads(self._reader.read(num_text)), self._reader.read(num_blob)


def pack_request(request: GenerationRequest) -> tuple[dict[str, Any], bytes]:
    """Raises RequestFailedError: it holds what this measurement doesn't need."""
    blobs: list[bytes] = []

    def part(one: object) -> dict[str, Any]:
        if isinstance(one, TextPart):
            return {"text": one.text}
        if not isinstance(one, ImagePart) or not isinstance(one.image, bytes):
            raise RequestFailedError(_REFUSED, value=type(one).__name__)
        blobs.append(one.image)
        return {"bytes": len(one.image), "max_pixels": one.max_pixels, "detail": one.detail}

    sampling = request.sampling
    is_more = sampling.logprobs is not None or sampling.response_format is not None or sampling.logit_bias
    if is_more or request.score_token_ids is not None or request.encode_only:
        raise RequestFailedError(_REFUSED, value=request.request_id)
    messages = [{"role": m.role, "parts": [part(p) for p in m.parts]} for m in request.messages]
    told = {
        "id": request.request_id, "messages": messages, "sampling": asdict(sampling), "arm": request.arm,
        "priority": request.priority, "timeout": request.timeout_seconds, "fetched": request.fetch_seconds,
    }  # fmt: skip
    return told, b"".join(blobs)


def unpack_request(told: Mapping[str, Any], blob: bytes) -> GenerationRequest:
    at = 0

    def parts(given: list[dict[str, Any]]) -> Iterator[TextPart | ImagePart]:
        nonlocal at
        for one in given:
            if "text" in one:
                yield TextPart(one["text"])
                continue
            yield ImagePart(blob[at : at + one["bytes"]], one["max_pixels"], one["detail"])
            at += one["bytes"]

    sampling = told["sampling"]
    listed = {name: tuple(sampling[name]) for name in ("stop", "stop_token_ids")}
    return GenerationRequest(
        told["id"],
        tuple(ChatMessage(m["role"], tuple(parts(m["parts"]))) for m in told["messages"]),
        SamplingParams(**{**sampling, **listed}),
        told["arm"],
        priority=told["priority"],
        timeout_seconds=told["timeout"],
        fetch_seconds=told["fetched"],
    )


def pack_event(event: TokenEvent) -> list[Any]:
    error = None if event.error is None else str(event.error)
    more = None
    if event.usage is not None or event.fusion is not None or event.timings is not None:
        more = [
            None if one is None else [asdict(f) for f in one] if isinstance(one, tuple) else asdict(one)
            for one in (event.fusion, event.usage, event.timings)
        ]
    return [event.request_id, event.text, event.token_ids, event.finish_reason, error, more]


def unpack_event(told: list[Any]) -> TokenEvent:
    request_id, text, ids, reason, error, more = told
    fusion, usage, timings = more or (None, None, None)
    return TokenEvent(
        request_id,
        text,
        tuple(ids),
        None if fusion is None else tuple(FusionWeights(**{**f, "warnings": tuple(f["warnings"])}) for f in fusion),
        reason,
        None if error is None else RequestFailedError(error),
        None if usage is None else Usage(**{**usage, "image_pixels": tuple(usage["image_pixels"])}),
        None if timings is None else Timings(**timings),
    )


@dataclass
class ProcessEngine:
    """An `Engine` (model_core.types) on this side of the wire. `step` waits for what the next step over there gives."""

    wire: Wire
    info: ModelInfo
    known: set[str] = field(default_factory=set)
    seen: EngineStats = field(default_factory=EngineStats)

    def prepare(self, request: GenerationRequest) -> tuple[str, dict[str, Any], bytes]:
        return (request.request_id, *pack_request(request))

    def fork(self, prepared: object, request: GenerationRequest) -> Any:  # noqa: ARG002
        raise RequestFailedError(_REFUSED, value=request.request_id)

    def add_request(self, prepared: tuple[str, dict[str, Any], bytes]) -> None:
        request_id, told, blob = prepared
        self.known.add(request_id)
        self.wire.send({"add": told}, blob)

    def abort(self, request_id: str) -> None:
        if request_id in self.known:
            self.known.discard(request_id)
            self.wire.send({"abort": request_id})

    def step(self) -> list[TokenEvent]:
        told, _ = self.wire.receive()
        events = [event for event in map(unpack_event, told["events"]) if event.request_id in self.known]
        self.known.difference_update(event.request_id for event in events if event.is_terminal)
        self.seen = EngineStats(**told["stats"])
        return events

    def reset_caches(self) -> None:
        self.wire.send({"reset": True})

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        raise RequestFailedError(_REFUSED, value=token_id)

    def has_work(self) -> bool:
        return bool(self.known)

    def stats(self) -> EngineStats:
        return self.seen


class EngineProgram:
    """The other side: turns the engine, takes commands between two steps, prepares in a pool."""

    def __init__(self, engine: Engine, wire: Wire, num_workers: int) -> None:
        self._engine, self._wire = engine, wire
        self._pool = ThreadPoolExecutor(num_workers, initializer=use_one_torch_thread)
        self._has_news = threading.Condition()
        self._news: list[tuple[str, Any]] = []
        self._aborted: set[str] = set()
        self._num_preparing = 0

    def run(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            events = self._take()
            if self._engine.has_work():
                events += self._engine.step()
            if events:
                stats = {name: _plain(value) for name, value in asdict(self._engine.stats()).items()}
                self._wire.send({"events": [pack_event(event) for event in events], "stats": stats})

    def _listen(self) -> None:
        while True:
            try:
                told, blob = self._wire.receive()
            except EOFError:
                os._exit(0)
            if "add" in told:
                with self._has_news:
                    self._num_preparing += 1
                self._pool.submit(self._prepare, told["add"], blob)
            else:
                self._tell(*next(iter(told.items())))

    def _prepare(self, told: Mapping[str, Any], blob: bytes) -> None:
        try:
            prepared: Any = self._engine.prepare(unpack_request(told, blob))
        except DualVisionError as error:
            self._tell("failed", TokenEvent(told["id"], error=error), is_prepared=True)
        else:
            self._tell("add", prepared, is_prepared=True)

    def _tell(self, what: str, value: Any, *, is_prepared: bool = False) -> None:
        with self._has_news:
            self._num_preparing -= is_prepared
            self._news.append((what, value))
            self._has_news.notify()

    def _take(self) -> list[TokenEvent]:
        """As the thread has it: an idle engine waits 5 ms for company that is on its way."""
        with self._has_news:
            if not self._engine.has_work():
                self._has_news.wait_for(lambda: self._news)
                self._has_news.wait_for(lambda: self._num_preparing == 0, 0.005)
            news, self._news = self._news, []
        events = []
        for what, value in news:
            if what == "reset":
                self._engine.reset_caches()
            elif what == "failed":
                events.append(value)
            elif what == "abort":
                self._aborted.add(value)
                self._engine.abort(value)
            elif value.request_id not in self._aborted:
                self._engine.add_request(value)
        return events


def _plain(value: Any) -> Any:
    """Counters by number as lists of pairs would be one more thing to convert: what is measured reads none of them."""
    return {} if isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()) else value


def start_engine(command: list[str]) -> ProcessEngine:
    here, there = socket.socketpair()
    subprocess.Popen([*command, "--wire", str(there.fileno())], pass_fds=[there.fileno()])
    there.close()
    wire = Wire(here)
    told, _ = wire.receive()
    return ProcessEngine(wire, ModelInfo(**{**told, "encoders": tuple(told["encoders"])}))


def run_engine(settings: Settings, limits: RequestLimits, descriptor: int) -> None:
    wire = Wire(socket.socket(fileno=descriptor))
    engine: Any = load_encoder(settings, limits).engine
    wire.send(asdict(engine.info))
    EngineProgram(engine, wire, settings.preprocess_workers).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8002)
    parser.add_argument("--data_dir", type=Path, required=True, help="of this server alone")
    parser.add_argument("--wire", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings, jobs = load_settings({"model": str(given.model), "port": given.port, "data_dir": given.data_dir})
    limits = RequestLimits.from_settings(settings, jobs)
    if given.wire is not None:
        run_engine(settings, limits, given.wire)
        return 0
    command = [sys.executable, "-m", "benchmarks.engine_process", *sys.argv[1:]]
    return serve(settings, jobs, lambda: start_engine(command))


if __name__ == "__main__":
    sys.exit(main())
