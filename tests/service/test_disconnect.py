"""A client that leaves, at any stage, streaming or not: its work ends at once and nobody else notices."""

import json
import socket
import statistics
import threading
import time
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from tests.service.conftest import LiveServer, ask
from tests.service.fakes import FakeEngine


def send(live: LiveServer, *args, **more) -> socket.socket:
    """A chat request on a connection of its own, which the test may cut whenever it likes."""
    body = json.dumps(ask(*args, **more)).encode()
    where = urlsplit(live.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection((where.hostname, where.port), timeout=20)
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def read_until(connection: socket.socket, mark: bytes) -> None:
    seen = b""
    while mark not in seen:
        piece = connection.recv(65536)
        assert piece, seen
        seen += piece


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("is_stream", [True, False])
def test_leaving_while_it_decodes(start, is_stream: bool, n: int):
    live = start(max_num_seqs=1, max_waiting=2)
    with closing(send(live, "forever", stream=is_stream, n=n, ignore_eos=True)) as connection:
        live.engine.wait_until(lambda: sum(row.num_done for row in live.engine.rows.values()) == n)
        if is_stream:
            read_until(connection, b'"content":"x"')
    live.engine.wait_until(lambda: len(live.engine.aborted) == n)
    assert set(live.engine.aborted) == set(live.engine.added)
    assert not live.engine.rows
    # The places are free again as soon as the aborts were sent.
    assert live.chat(n=3).status_code == 200


@pytest.mark.parametrize("is_stream", [True, False])
def test_leaving_while_it_waits(start, is_stream: bool):
    live = start(max_num_seqs=1, max_waiting=0)
    live.engine.hold()
    with closing(send(live, "forever", stream=is_stream)):
        live.engine.wait_until(lambda: live.engine.rows)
    live.engine.wait_until(lambda: live.engine.aborted)
    assert live.engine.num_steps == 0
    live.engine.release()
    assert live.chat().status_code == 200


@pytest.mark.parametrize("is_stream", [True, False])
def test_leaving_while_its_pictures_are_decoded(start, is_stream: bool):
    class Slow(FakeEngine):
        def prepare(self, request):
            prepared = super().prepare(request)
            if "forever" in str(request.messages):
                assert may_go_on.wait(20)
            return prepared

    may_go_on = threading.Event()
    live = start(Slow(), max_num_seqs=1, max_waiting=0)
    with closing(send(live, "forever", stream=is_stream)):
        live.engine.wait_until(lambda: live.engine.seen)
    # Its place is free although its thread is still at work; nothing of it reaches the engine afterwards.
    while live.chat().status_code == 503:
        pass
    may_go_on.set()
    assert live.chat().status_code == 200
    assert len(live.engine.added) == 2
    assert not live.engine.rows


def test_leaving_before_the_body_is_whole(start):
    live = start(max_num_seqs=1, max_waiting=0)
    where = urlsplit(live.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
    with closing(socket.create_connection((where.hostname, where.port), timeout=20)) as connection:
        connection.sendall(f"{head}content-length: 100000\r\n\r\n".encode() + b"{" * 50_000)
        while live.metric("dve_waiting_body_bytes") == 0:
            pass
    while live.metric("dve_waiting_body_bytes") != 0:
        pass
    assert live.chat().status_code == 200
    assert len(live.engine.seen) == 1


def test_the_others_are_left_alone(start):
    live = start()
    live.engine.hold()
    answers: list = []

    def ask_along() -> None:
        answers.append(live.chat(images=1))

    others = [threading.Thread(target=ask_along) for _ in range(2)]
    for thread in others:
        thread.start()
    live.engine.wait_until(lambda: len(live.engine.rows) == 2)
    with closing(send(live, "forever")):
        live.engine.wait_until(lambda: len(live.engine.rows) == 3)
    live.engine.wait_until(lambda: live.engine.aborted)
    live.engine.release()
    for thread in others:
        thread.join(20)
    assert [a.json()["choices"][0]["message"]["content"] for a in answers] == ["a red fox"] * 2
    assert live.metric('dve_request_failure_total{code="client_disconnected"}') == 1


def free_seconds(live: LiveServer, is_stream: bool) -> float:
    """From the close of one of 16 clients until the engine has let go of its row; the 15 stay."""
    connections = [send(live, "forever", stream=is_stream, ignore_eos=True) for _ in range(16)]
    live.engine.wait_until(lambda: sum(row.num_done for row in live.engine.rows.values()) == 16, 20)
    num_aborted = len(live.engine.aborted)
    begin = time.monotonic()
    connections[7].close()
    live.engine.wait_until(lambda: len(live.engine.rows) == 15, 20)
    seconds = time.monotonic() - begin
    assert len(live.engine.aborted) == num_aborted + 1
    for connection in connections:
        connection.close()
    live.engine.wait_until(lambda: not live.engine.rows, 20)
    return seconds


@pytest.mark.parametrize("is_stream", [True, False])
def test_one_of_sixteen_frees_its_place_at_once(start, is_stream: bool):
    live = start(max_num_seqs=16, max_waiting=16)
    assert statistics.median(free_seconds(live, is_stream) for _ in range(3)) < 0.2


@pytest.mark.heavy
@pytest.mark.parametrize("is_stream", [True, False])
def test_one_of_sixteen_frees_its_place_at_once_fifty_times(start, is_stream: bool, record_property):
    live = start(max_num_seqs=16, max_waiting=16)
    seconds = sorted(free_seconds(live, is_stream) for _ in range(50))
    record_property("median and worst, ms", [round(seconds[i] * 1000, 1) for i in (25, -1)])
    assert seconds[-1] < 0.2
