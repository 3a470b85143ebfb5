"""A server's memory over many requests of every kind: what one leaves behind is less than a KiB."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import pytest

from tests.service.conftest import ask, image_part
from tests.service.fakes import PNG
from tests.service.test_lifecycle import Process, running

CHAT = "/v1/chat/completions"
NUM_KINDS = 10


def rss_bytes(process: Process) -> int:
    with open(f"/proc/{process.popen.pid}/status") as status:
        (line,) = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def leave_early(url: str, is_stream: bool) -> None:
    body = json.dumps(ask("forever", stream=is_stream)).encode()
    where = urlsplit(url)
    with closing(socket.create_connection((where.hostname, where.port), timeout=20)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


def send(client: httpx.Client, number: int) -> None:
    """One of ten kinds: whole and streamed answers, refusals of three layers, an upload, clients that leave."""
    kind, body = number % NUM_KINDS, ask(f"number {number}", images=1)
    if kind < 3:
        client.post(CHAT, json=body | {"stream": kind == 1, "n": 1 + kind, "logprobs": kind == 2})
    elif kind == 3:
        client.post(CHAT, json=body | {"messages": [{"role": "user", "content": [image_part(b"x" * 50_000)]}]})
    elif kind == 4:
        client.post(CHAT, json=body | {"temperature": number, f"unknown{number}": 1})
    elif kind == 5:
        client.get(f"/nowhere/{number}")
    elif kind == 6:
        client.post("/v1/fusion/analyze", files={"file": ("x.png", PNG)})
    elif kind == 7:
        client.post("/v1/encoders/compare", json=ask(images=1) | {"max_tokens": 8})
    elif kind == 8:
        leave_early(str(client.base_url), number % 20 == 8)
    else:
        with contextlib.suppress(httpx.RemoteProtocolError):
            client.post(CHAT, content=b'{"messages": [', headers={"content-type": "application/json"})


def slope(values: list[tuple[int, int]]) -> float:
    """Of the line that fits best."""
    mean_x = sum(x for x, _ in values) / len(values)
    mean_y = sum(y for _, y in values) / len(values)
    return sum((x - mean_x) * (y - mean_y) for x, y in values) / sum((x - mean_x) ** 2 for x, _ in values)


def measure(warm: int, count: int) -> float:
    seen = []
    with running("forgetful") as process, httpx.Client(base_url=process.url, timeout=20) as client:
        threading.Thread(target=process.read_on, daemon=True).start()
        for number in range(warm + count):
            send(client, number)
            if number >= warm and number % 50 == 0:
                seen.append((number, rss_bytes(process)))
        assert client.post(CHAT, json=ask()).status_code == 200
        process.signal()
        assert process.popen.wait(20) == 0
    return slope(seen)


def test_memory_stays_flat_over_a_few_requests():
    """A leak of a body or an answer would be tens of KiB a request."""
    assert measure(200, 200) < 10_000


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_memory_grows_by_less_than_a_kib_a_request(record_property):
    found = measure(1000, 2000)
    record_property("bytes a request", round(found))
    assert found <= 1024
