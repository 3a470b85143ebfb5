"""The edge by raw sockets: slow, silent, endless, odd clients. Limits are fractions of a second, closes are awaited."""

import json
import re
import threading
import tracemalloc
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from service.main import server_config
from tests.service.conftest import LiveServer, ask, run_server
from tests.service.fakes import FakeEngine
from tests.service.sockets import CHAT, PROBE, SHORT, check_refused, connect, exchange, parts, read_all

NGINX = Path(__file__).resolve().parents[2] / "deploy/nginx/nginx.conf"


@pytest.fixture(scope="module")
def strict():
    with run_server(FakeEngine(), edge=SHORT, body_seconds=0.3) as live:
        yield live


# Slow


def test_silence_is_cut_without_a_word(strict: LiveServer):
    assert exchange(strict, b"") == b""


@pytest.mark.parametrize("head", [b"G", b"GET / HTTP/1.1\r\nhost: localhost\r\n", PROBE[:-1], b"\r\n\r\nPOST /"])
def test_half_a_head_is_answered_408(strict: LiveServer, head: bytes):
    check_refused(exchange(strict, head), 408, "request_timeout")


def test_a_head_that_drips_has_no_more_time_than_one_that_stops(strict: LiveServer):
    """uvicorn waits for ever: every byte of a partial head starts nothing and ends nothing."""
    with closing(connect(strict)) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n")
        connection.settimeout(0.02)
        answer = b""
        for i in range(1000):
            try:
                connection.sendall(b"x-%d: y\r\n" % i)
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue
    check_refused(answer, 408, "request_timeout")


def test_a_second_head_is_timed_too(strict: LiveServer):
    with closing(connect(strict)) as connection:
        connection.sendall(PROBE)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET / HT")
        check_refused(read_all(connection), 408, "request_timeout")


@pytest.mark.parametrize("framing", [b"content-length: 1000\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"])
@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/fusion/analyze", b"/v1/encoders/compare"])
def test_half_a_body_is_answered_408(strict: LiveServer, framing: bytes, path: bytes):
    before = len(strict.engine.seen)
    head = b"POST " + path + b" HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    answer = exchange(strict, head + framing)
    status, headers, body = parts(answer)
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert headers["connection"] == "close"
    assert len(strict.engine.seen) == before
    assert strict.metric("dve_waiting_body_bytes") == 0


def test_a_body_that_keeps_coming_has_its_time(start):
    """A second more for each 8 KiB: 64 KiB in hand outlast a limit of 0.2 s, then the rest arrives."""
    live = start(body_seconds=0.2)
    body = json.dumps(ask() | {"unknown": "x" * 80_000}).encode()
    with closing(connect(live)) as connection:
        connection.sendall(CHAT + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:65_536])
        threading.Event().wait(0.5)  # the slowness under test
        connection.sendall(body[65_536:])
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_nobody_wants_does_not_keep_its_connection(strict: LiveServer):
    with closing(connect(strict)) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")
        connection.settimeout(0.02)
        for _ in range(1000):
            try:
                connection.sendall(b"x")
                if connection.recv(65536) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            raise AssertionError("the connection stayed open")


# Stalled


def test_a_client_that_never_reads_is_cut_and_the_others_are_not(start):
    class Long(FakeEngine):
        """To "stalled" 9 MB, more than the kernels of both sides buffer, and no end."""

        def prepare(self, request):
            row = super().prepare(request)
            if request.messages[0].parts[0].text == "stalled":
                row.words = ("x" * 100_000,) * 100
            return row

        def _advance(self, row):
            return [] if row.num_done == 90 else super()._advance(row)

    live = start(Long(), edge=SHORT, max_num_seqs=2, max_waiting=1)
    body = json.dumps(ask("stalled", stream=True)).encode()
    with closing(connect(live, receive_bytes=4096)) as connection:
        connection.sendall(CHAT + b"content-length: %d\r\n\r\n" % len(body) + body)
        live.engine.wait_until(lambda: live.engine.seen)
        for _ in range(20):
            assert live.chat(stream=True).text.endswith("data: [DONE]\n\n")
        while live.metric('dve_request_failure_total{code="client_disconnected"}') == 0:
            pass
        seen = read_all(connection)
    assert seen.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in seen
    assert not live.engine.rows
    # All places are free.
    assert live.chat(n=3).status_code == 200


# Large


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a" * 5000 + b": b\r\n\r\n",
    ],
)
def test_a_head_over_the_limit_is_answered_431(strict: LiveServer, head: bytes):
    check_refused(exchange(strict, head), 431, "headers_too_large")


@pytest.mark.parametrize("piece", [b"a" * 65_536, b"a: b\r\n" * 10_000])
def test_a_head_without_end_is_cut_while_it_comes(start, piece: bytes):
    live = start()
    answer, num_sent = b"", 0
    with closing(connect(live)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nlong: ")
        try:
            while num_sent < 100 * len(piece):
                connection.sendall(piece)
                num_sent += len(piece)
        except OSError:
            pass
        answer = read_all(connection)
    assert answer == b"" or b" 431 " in answer  # a reset may overtake the answer
    assert num_sent < 100 * len(piece)
    assert live.chat().status_code == 200


# One after the other


def test_a_request_before_the_answer_to_the_last_is_ignored(shared: LiveServer):
    """Pipelined requests once hid the first one's client leaving: only the last was told."""
    answer = exchange(shared, PROBE + PROBE + PROBE)
    assert answer.count(b"HTTP/1.1 200 ") == 1
    assert b"connection: close" in answer


@pytest.mark.parametrize("behind", [PROBE, b"nonsense\r\n\r\n", b"a" * 100_000])
def test_what_comes_into_a_stream_does_not_get_into_it(start, behind: bytes):
    live = start(edge=SHORT)
    live.engine.hold()
    body = json.dumps(ask(stream=True)).encode()
    with closing(connect(live)) as connection:
        connection.sendall(CHAT + b"content-length: %d\r\n\r\n" % len(body) + body)
        live.engine.wait_until(lambda: live.engine.rows)
        connection.sendall(behind)
        live.engine.release()
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("behind", [PROBE, b"nonsense\r\n\r\n", b"x" * 300_000])
def test_leaving_is_noticed_behind_anything(start, behind: bytes):
    live = start(max_num_seqs=1, max_waiting=0)
    body = json.dumps(ask("forever")).encode()
    with closing(connect(live)) as connection:
        connection.sendall(CHAT + b"content-length: %d\r\n\r\n" % len(body) + body)
        live.engine.wait_until(lambda: live.engine.rows)
        connection.sendall(behind)
    live.engine.wait_until(lambda: live.engine.aborted)


def test_one_connection_carries_many_requests(shared: LiveServer):
    body = json.dumps(ask()).encode()
    with closing(connect(shared)) as connection:
        for _ in range(20):
            connection.sendall(CHAT + b"content-length: %d\r\n\r\n" % len(body) + body)
            seen = b""
            while not seen.endswith(b'"fusion":[]}'):
                piece = connection.recv(65536)
                assert piece, seen
                seen += piece
            assert seen.startswith(b"HTTP/1.1 200 ")


def test_what_the_edge_refuses_is_counted(start):
    live = start(edge=SHORT)
    exchange(live, b"nonsense\r\n\r\n")
    exchange(live, b"GET /")
    assert live.metric('dve_http_requests_total{retry_after="false",route="unmatched",status="400"}') == 1
    assert live.metric('dve_http_requests_total{retry_after="false",route="unmatched",status="408"}') == 1


# Forms


FIELD = b'--b\r\ncontent-disposition: form-data; name="f%d"\r\n\r\nx\r\n'
FORMS = {
    "10,000 parts": (b"multipart/form-data; boundary=b", b"".join(FIELD % i for i in range(10_000)) + b"--b--\r\n"),
    "no boundary": (b"multipart/form-data", b"--b\r\n" * 300_000),
    "no filename": (
        b"multipart/form-data; boundary=b",
        b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\n' + b"x" * 2_000_000 + b"\r\n--b--\r\n",
    ),
    "no end": (b"multipart/form-data; boundary=b", FIELD + b"y" * 2_000_000),
}


@pytest.mark.parametrize("name", FORMS)
def test_hostile_forms_leave_memory_flat(start, name: str):
    live = start()
    kind, body = FORMS[name]
    head = b"POST /v1/fusion/analyze HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: " + kind
    sent = head + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    assert exchange(live, sent)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")
    tracemalloc.start()
    try:
        for _ in range(5):
            assert exchange(live, sent)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < 1_000_000, "nothing of it is kept"
    assert peak < 2 * len(body) + 2_000_000


def test_an_idle_connection_is_kept_for_longer_than_clients_keep_it() -> None:
    app = SimpleNamespace(state=SimpleNamespace(parts=SimpleNamespace(metrics=None)))
    kept = server_config(app).timeout_keep_alive
    assert kept > httpx.Limits().keepalive_expiry
    assert kept > 60, "load balancers"
    # Our nginx keeps none to the server: it looks the server's address up again and again.
    assert not re.findall(r"^\s*(?:upstream|keepalive) ", NGINX.read_text(), re.MULTILINE)
