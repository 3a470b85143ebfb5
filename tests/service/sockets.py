"""Clients made of raw sockets, which may send what no library would and read when they like."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from urllib.parse import urlsplit

from service.edge import EdgeLimits
from tests.service.conftest import LiveServer

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
PROBE = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
SHORT = EdgeLimits(head_bytes=2048, head_seconds=0.3, stall_seconds=0.3)


def connect(live: LiveServer, receive_bytes: int | None = None) -> socket.socket:
    where = urlsplit(live.url)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20)
    connection.connect((where.hostname, where.port))
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes; a reset is a close too."""
    seen = b""
    try:
        while piece := connection.recv(65536):
            seen += piece
    except ConnectionResetError:
        pass
    return seen


def exchange(live: LiveServer, sent: bytes) -> bytes:
    with closing(connect(live)) as connection:
        connection.sendall(sent)
        return read_all(connection)


def parts(answer: bytes) -> tuple[int, dict[str, str], dict]:
    """The status, headers and JSON of an answer that ended with its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert len(body) == int(headers["content-length"]), answer
    return int(first.split()[1]), headers, json.loads(body)


def check_refused(answer: bytes, status: int, code: str) -> None:
    seen, headers, body = parts(answer)
    assert (seen, body["error"]["code"]) == (status, code)
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert len(headers["x-request-id"]) == 32
