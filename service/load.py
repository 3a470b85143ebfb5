"""Closed-loop load on one OpenAI-compatible endpoint: C streams, each sending its next request when one ends.

In: an endpoint, ready bodies, a clock. Out: a timing for each request, and what the server's own metrics say. Needs
aiohttp (extra `bench`). It knows no model: what it measures is what a client sees.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from model_core.analysis.latency import STAGES, RequestTiming, hit_ratios, stage_shares
from model_core.errors import ConfigError

try:
    import aiohttp
except ModuleNotFoundError as missing:  # who only serves does without it
    raise ConfigError(
        "loading an endpoint needs a package that is not installed", value=missing.name, allowed="the extra 'bench'",
        fix="pip install 'dual-vision-encoder[bench]', or 'make bench'",
    ) from missing  # fmt: skip

Clock = Callable[[], float]
#: (sample name, the value of its label `encoder` or "") -> value, summed over other labels
Samples = Mapping[tuple[str, str], float]

_ERROR_CHARACTERS = 200
_LINE_BYTES = 2**20  # a frame is one line, and aiohttp refuses lines above twice its buffer


@dataclass(frozen=True, slots=True)
class Endpoint:
    """url: as far as `/v1`, without it. key: sent as a bearer token; "" sends none."""

    url: str
    model: str
    key: str = ""


class StreamError(Exception):
    """What an endpoint said instead of an answer; never passes this module."""


@dataclass(slots=True)
class _Stream:
    """One answer as it comes in. end: when its last frame came."""

    end: float
    pieces: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = False


def request_body(
    model: str,
    question: str,
    jpeg: bytes | None,
    num_tokens: int,
    *,
    sampling: Mapping[str, float | int] = MappingProxyType({"temperature": 0}),
) -> bytes:
    """A chat request that gives exactly `num_tokens`: streamed with usage, the end of turn ignored; else greedy."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if jpeg is not None:
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": num_tokens,
        **sampling,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def open_session(key: str, timeout_seconds: float) -> aiohttp.ClientSession:
    """As many connections as there are streams. Close it with `async with`."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=aiohttp.ClientTimeout(total=timeout_seconds),
        read_bufsize=_LINE_BYTES,
    )


async def first_model(session: aiohttp.ClientSession, url: str) -> str:
    """The first id that the endpoint lists.

    Raises:
        ConfigError: nobody answers there, or not with a list of models.
    """
    try:
        async with session.get(f"{url}/v1/models") as response:
            if response.status != 200:
                raise StreamError(await _refusal(response))
            return str((await response.json(content_type=None))["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError, StreamError) as error:
        raise ConfigError(
            f"the endpoint lists no models ({_shown(error)})", value=url,
            allowed="the address of a running OpenAI-compatible server", fix="Start it, or name its model with --model",
        ) from error  # fmt: skip


async def run_load(
    session: aiohttp.ClientSession, endpoint: Endpoint, bodies: Sequence[bytes], concurrency: int, clock: Clock
) -> tuple[list[RequestTiming], float]:
    """Send all bodies over `concurrency` streams. A failed request is a timing with an error.

    Returns:
        timings in the order in which the requests ended; seconds over all.
    """
    waiting: Iterator[bytes] = iter(bodies)
    timings: list[RequestTiming] = []

    async def stream() -> None:
        for body in waiting:  # the iterator is shared: whoever is free takes the next
            timings.append(await send(session, endpoint, body, clock))

    begin = clock()
    await asyncio.gather(*(stream() for _ in range(concurrency)))
    return timings, clock() - begin


async def send(session: aiohttp.ClientSession, endpoint: Endpoint, body: bytes, clock: Clock) -> RequestTiming:
    """One request and its streamed answer. A piece is a frame whose delta has text: the frame that only names the
    role, which some servers send before they have begun, is none."""
    start = clock()
    url, headers = f"{endpoint.url}/v1/chat/completions", {"Content-Type": "application/json"}
    try:
        async with session.post(url, data=body, headers=headers) as response:
            if response.status != 200:
                raise StreamError(await _refusal(response))
            stream = await _read(response.content, start, clock)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, StreamError) as error:
        return RequestTiming(start, clock(), error=_shown(error))
    return RequestTiming(
        start=start,
        end=stream.end,
        pieces=tuple(stream.pieces or [stream.end]),  # tokens without text still came, at the latest now
        num_tokens=int(stream.usage.get("completion_tokens", len(stream.pieces))),
        num_prompt_tokens=int(stream.usage.get("prompt_tokens", 0)),
    )


async def _read(lines: AsyncIterable[bytes], start: float, clock: Clock) -> _Stream:
    """Raises StreamError: an error frame, or an end without `[DONE]`; ValueError: a frame that is no JSON."""
    stream = _Stream(end=start)
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        frame = line[5:].strip()
        if frame == b"[DONE]":
            stream.is_whole = True
            continue
        stream.end = clock()
        chunk = json.loads(frame)
        if chunk.get("error") is not None:
            raise StreamError(_message(chunk["error"]))
        stream.usage = chunk.get("usage") or stream.usage
        if any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices") or ()):
            stream.pieces.append(stream.end)
    if not stream.is_whole:
        raise StreamError(f"the stream broke off after {len(stream.pieces)} pieces")
    return stream


async def _refusal(response: aiohttp.ClientResponse) -> str:
    text = await response.text(errors="replace")
    try:
        found = json.loads(text)
        text = _message(found.get("error", found))
    except (ValueError, AttributeError):
        pass
    return f"{response.status} {text}"


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _shown(error: BaseException) -> str:
    """One line that says something: a TimeoutError has no text of its own."""
    text = " ".join(str(error).split())
    shown = (
        text if isinstance(error, StreamError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
    )
    return shown[:_ERROR_CHARACTERS]


async def read_metrics(session: aiohttp.ClientSession, url: str) -> Samples:
    """What `/metrics` says; empty where there is none that can be read."""
    try:
        async with session.get(f"{url}/metrics") as response:
            return parse_metrics(await response.text()) if response.status == 200 else {}
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return {}


def parse_metrics(text: str) -> dict[tuple[str, str], float]:
    """Raises ValueError: this is no Prometheus exposition."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("encoder", "")
            found[key] = found.get(key, 0.0) + sample.value
    return found


def metric_figures(before: Samples, after: Samples) -> dict[str, float]:
    """Cache hit rates and shares of requests' time between two readings of this project's server.

    Empty for another server's metrics.
    """

    def grown(name: str, label: str = "") -> float:
        return after.get((name, label), 0.0) - before.get((name, label), 0.0)

    encoders = _labels(after, "dve_encoder_cache_misses_total") | _labels(after, "dve_encoder_cache_hits_total")
    hits = {name: grown("dve_encoder_cache_hits_total", name) for name in sorted(encoders)}
    lookups = {name: count + grown("dve_encoder_cache_misses_total", name) for name, count in hits.items()}
    hits["prefix"] = grown("dve_prefix_cache_hits_total")
    lookups["prefix"] = grown("dve_prefix_cache_queries_total")
    seconds = {stage: grown(f"dve_request_{stage}_time_seconds_sum") for stage in STAGES}
    return {**hit_ratios(hits, lookups), **stage_shares(seconds)}


def _labels(samples: Iterable[tuple[str, str]], name: str) -> set[str]:
    return {label for found, label in samples if found == name and label}
