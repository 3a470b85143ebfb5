"""Requests that two readers could take for two different things: refused, and nothing behind them is read."""

import json

import pytest

from tests.service.conftest import LiveServer, ask
from tests.service.sockets import CHAT, PROBE, SHORT, check_refused, exchange, parts

BAD_HEADS = {
    "two lengths": b"content-length: 3\r\ncontent-length: 5\r\n\r\nabcde",
    "one length twice": b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc",
    "a list of lengths": b"content-length: 3, 3\r\n\r\nabc",
    "length and coding": b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding and length": b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"transfer-encoding: gzip\r\n\r\nabc",
    "gzip in chunks": b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks in gzip": b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "nearly chunked": b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, identity": b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "a signed length": b"content-length: +3\r\n\r\nabc",
    "a negative length": b"content-length: -3\r\n\r\nabc",
    "a hexadecimal length": b"content-length: 0x3\r\n\r\nabc",
    "a length with _": b"content-length: 1_0\r\n\r\nabcdefghij",
    "no length": b"content-length: \r\n\r\nabc",
    "a length past 2^64": b"content-length: 99999999999999999999999\r\n\r\nabc",
    "a bare LF": b"a: b\ncontent-length: 3\r\n\r\nabc",
    "a bare LF at the end": b"content-length: 3\r\n\nabc",
    "a bare CR": b"a: b\rcontent-length: 3\r\n\r\nabc",
    "a folded line": b"a: b\r\n c\r\ncontent-length: 3\r\n\r\nabc",
    "a folded coding": b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a zero byte": b"a: b\x00c\r\n\r\n",
    "a space in a name": b"a b: c\r\n\r\n",
    "no colon": b"abc\r\n\r\n",
    "no name": b": c\r\n\r\n",
    "two hosts": b"host: y\r\n\r\n",
}
BAD_CHUNKS = {
    "a size past 2^64": b"ffffffffffffffffff\r\nabc",
    "a negative size": b"-3\r\nabc\r\n0\r\n\r\n",
    "a size with 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a size with a space": b"3 \r\nabc\r\n0\r\n\r\n",
    "a bare LF": b"3\nabc\n0\n\n",
    "a bare LF behind": b"3\r\nabc\n0\r\n\r\n",
    "a LF in an extension": b"3;a\nbc\r\nabc\r\n0\r\n\r\n",
    "more than its size": b"3\r\nabcd\r\n0\r\n\r\n",
}
BAD_LINES = [
    b"GET /health/live\r\n\r\n",
    b"GET /health/live HTTP/1.1\r\n\r\n",
    b"GET /health/live HTTP/1.2\r\nhost: localhost\r\n\r\n",
    b"GET /health/live HTTP/2.0\r\nhost: localhost\r\n\r\n",
    b"GET\t/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET /health/live HTTP/1.1\nhost: x\n\n",
    b"FROB / HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST / HTTP/1.0\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 20,
]


@pytest.mark.parametrize("rest", BAD_HEADS.values(), ids=BAD_HEADS)
def test_a_head_that_could_mean_two_things_is_refused(shared: LiveServer, rest: bytes):
    before = len(shared.engine.seen)
    check_refused(exchange(shared, CHAT + rest + PROBE), 400, "invalid_http_request")
    assert len(shared.engine.seen) == before


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_chunks_that_could_mean_two_things_are_refused(shared: LiveServer, chunks: bytes):
    head = CHAT + b"transfer-encoding: chunked\r\n\r\n"
    check_refused(exchange(shared, head + chunks + PROBE), 400, "invalid_http_request")


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_first_line_that_is_none_is_refused(shared: LiveServer, line: bytes):
    check_refused(exchange(shared, line), 400, "invalid_http_request")


def test_a_chunk_of_almost_endless_size_takes_no_memory(start):
    live = start(edge=SHORT, body_seconds=0.3)
    head = CHAT + b"transfer-encoding: chunked\r\n\r\nffffffffffffff0\r\nabc"
    assert parts(exchange(live, head))[0] == 408


def test_trailers_are_no_headers(shared: LiveServer):
    body = json.dumps(ask()).encode()
    sent = CHAT + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n%x\r\n" % len(body) + body
    answer = exchange(shared, sent + b"\r\n0\r\nx-request-id: from-the-trailer\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"from-the-trailer" not in answer


def test_a_good_request_in_chunks_with_extensions_works(shared: LiveServer):
    body = json.dumps(ask()).encode()
    pieces = b"".join(b'1;a="b"\r\n%c\r\n' % byte for byte in body)
    sent = CHAT + b"Transfer-Encoding: Chunked\r\nconnection: close\r\n\r\n" + pieces + b"0\r\n\r\n"
    assert exchange(shared, sent).startswith(b"HTTP/1.1 200 ")


def test_an_upgrade_is_not_followed(shared: LiveServer):
    for more in (b"upgrade: h2c\r\n", b"upgrade: websocket\r\nsec-websocket-key: x\r\n"):
        answer = exchange(shared, PROBE[:-2] + b"connection: upgrade\r\n" + more + b"\r\n" + PROBE)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1 ") == 1
