"""More at once than there is room for: those that were admitted are served rightly, the rest cost nothing."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import pytest

from tests.service.conftest import LiveServer, ask
from tests.service.fakes import FakeEngine

CHAT = "/v1/chat/completions"
NUM_SEQS, NUM_WAITING = 16, 64


def post_all(live: LiveServer, count: int, is_stream: bool) -> list[httpx.Response]:
    """All at once; the engine is held until every refusal has come, so that who is admitted is known."""
    admitted, refused, is_full = NUM_SEQS + NUM_WAITING, count - NUM_SEQS - NUM_WAITING, threading.Event()

    async def post_each() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=count, max_keepalive_connections=0)
        num_refused = 0
        async with httpx.AsyncClient(base_url=live.url, timeout=60, limits=limits) as client:

            async def post(i: int) -> httpx.Response:
                nonlocal num_refused
                response = await client.post(CHAT, json=ask(f"number {i}", images=2, stream=is_stream))
                num_refused += response.status_code == 503
                if num_refused == refused:
                    is_full.set()
                return response

            return await asyncio.gather(*(post(i) for i in range(count)))

    def release() -> None:
        assert is_full.wait(60)
        live.engine.wait_until(lambda: len(live.engine.rows) == admitted, 60)
        live.engine.release()

    live.engine.hold()
    releasing = threading.Thread(target=release)
    releasing.start()
    answers = asyncio.run(post_each())
    releasing.join(60)
    return answers


def said(response: httpx.Response, is_stream: bool) -> str:
    if not is_stream:
        return response.json()["choices"][0]["message"]["content"]
    frames = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    return "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames)


def check_overload(live: LiveServer, count: int, is_stream: bool) -> None:
    answers = post_all(live, count, is_stream)
    room = NUM_SEQS + NUM_WAITING
    assert Counter(answer.status_code for answer in answers) == {200: room, 503: count - room}
    for answer in answers:
        if answer.status_code == 200:
            assert said(answer, is_stream) == "a red fox"
        else:
            assert answer.json()["error"]["code"] == "server_overloaded"
            assert answer.headers["retry-after"] == "1"
    # Nothing of a refused request was decoded, and nobody's place is lost.
    assert live.engine.num_decoded == 2 * room
    assert len(live.engine.seen) == room
    assert live.chat().status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
def test_two_hundred_at_once_on_a_queue_of_64(start, is_stream: bool):
    check_overload(start(FakeEngine(), max_num_seqs=NUM_SEQS, max_waiting=NUM_WAITING), 200, is_stream)


#: All connections first, then every request in one go, then the answers' statuses as they come.
CLIENT = """
import selectors, socket, sys
port, count, request = int(sys.argv[1]), int(sys.argv[2]), sys.stdin.buffer.read()
ready = selectors.DefaultSelector()
answers = {}
for _ in range(count):
    connection = socket.create_connection(("127.0.0.1", port))
    ready.register(connection, selectors.EVENT_READ)
    answers[connection] = b""
for connection in answers:
    connection.sendall(request)
num_refused = 0
while ready.get_map():
    for key, _ in ready.select():
        piece = key.fileobj.recv(65536)
        answers[key.fileobj] += piece
        if not piece:
            ready.unregister(key.fileobj)
            answer = answers[key.fileobj]
            is_whole = answer.endswith(b"data: [DONE]\\n\\n\\r\\n0\\r\\n\\r\\n") and b" fox" in answer
            print(answer[9:12].decode(), is_whole, b"retry-after: 1" in answer, flush=True)
"""


def test_half_a_request_keeps_its_place_for_a_moment_only(start):
    """A place is kept while a body comes, but not from those whose body has come."""
    live = start(max_num_seqs=1, max_waiting=0)
    where = urlsplit(live.url)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{{"
    with closing(socket.create_connection((where.hostname, where.port), timeout=20)) as connection:
        connection.sendall(head.encode())
        while live.metric("dve_waiting_body_bytes") == 0:
            pass
        statuses = {live.chat().status_code}
        while 200 not in statuses:
            statuses.add(live.chat().status_code)
        assert live.metric("dve_waiting_body_bytes") == 1, "it is still there"
    assert statuses <= {200, 503}


@pytest.mark.heavy
def test_a_thousand_at_once_from_another_process(start, caplog: pytest.LogCaptureFixture, record_property):
    """A refusal's time is from the call of the application, with the request's head, to its answer's last byte."""
    live = start(FakeEngine(), max_num_seqs=NUM_SEQS, max_waiting=NUM_WAITING)
    room, count = NUM_SEQS + NUM_WAITING, 1000
    body = json.dumps(ask("what?", images=2, stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    command = [sys.executable, "-c", CLIENT, str(urlsplit(live.url).port), str(count)]
    live.engine.hold()
    with (
        caplog.at_level("INFO", "dve"),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client,
    ):
        client.stdin.write(request)
        client.stdin.close()
        refused = Counter(client.stdout.readline().split()[0] for _ in range(count - room))
        live.engine.wait_until(lambda: len(live.engine.rows) == room, 60)
        live.engine.release()
        served = Counter(client.stdout.read().decode().splitlines())
    assert refused == {b"503": count - room}
    assert served == {"200 True False": room}
    assert live.engine.num_decoded == 2 * room
    logged = [record.fields for record in caplog.records if record.getMessage() == "request"]
    seconds = sorted(fields["seconds"] for fields in logged if fields["status"] == 503)
    assert len(seconds) == count - room
    p50, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
    record_property("refusals: p50, p99, worst, ms", [round(s * 1000, 1) for s in (p50, p99, seconds[-1])])
    assert p99 < 0.020


def test_a_request_past_its_deadline_while_it_queues_costs_nothing(start):
    """The engine's own clock and ours both know the deadline; whoever sees it first, it is a timeout."""
    live = start(max_num_seqs=1, max_waiting=1, request_timeout_seconds=0.3, batch_window_seconds=0.0)
    live.engine.hold()
    late = live.chat(images=1)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert late.headers["x-should-retry"] == "false"
    live.engine.wait_until(lambda: live.engine.aborted)
    assert live.engine.num_steps == 0
    live.engine.release()
    assert live.chat().status_code == 200
