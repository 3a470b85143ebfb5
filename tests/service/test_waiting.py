"""The cap on the bytes of bodies that wait: refused while full, free again when the engine has begun."""

import json
import threading

import pytest

from model_core.errors import OverloadedError
from service.waiting import WaitingBody, WaitingBytes
from tests.service.conftest import LiveServer, ask

CHAT = "/v1/chat/completions"
LIMITS = {"max_body_bytes": 4096, "max_waiting_bytes": 4096, "max_image_bytes": 2048}


def padded(text: str, num_bytes: int, **more) -> bytes:
    """A chat body of exactly so many bytes."""
    body = ask(text, **more)
    body["pad"] = "x" * (num_bytes - len(json.dumps({**body, "pad": ""})))
    encoded = json.dumps(body).encode()
    assert len(encoded) == num_bytes
    return encoded


def post(live: LiveServer, body: bytes, *, is_chunked: bool = False):
    size = max(len(body) // 16, 1)
    pieces = (body[i : i + size] for i in range(0, len(body), size))
    return live.http.post(CHAT, content=pieces if is_chunked else body, headers={"content-type": "application/json"})


def test_the_count():
    waiting = WaitingBytes(10)
    first, second = WaitingBody(waiting), WaitingBody(waiting)
    first.add(6)
    second.add(4)
    with pytest.raises(OverloadedError, match="10 bytes and 1 more"):
        second.add(1)
    assert waiting.num_bytes == 10
    first.release()
    first.release()
    assert waiting.num_bytes == 4
    second.add(6)
    second.release()
    assert waiting.num_bytes == 0


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_without_room_is_refused_and_may_come_again(start, is_chunked: bool):
    live = start(**LIMITS)
    live.engine.hold()
    first = threading.Thread(target=post, args=(live, padded("what?", 2500)))
    first.start()
    live.engine.wait_until(lambda: live.engine.rows)
    assert live.metric("dve_waiting_body_bytes") == 2500
    refused = post(live, padded("what?", 2000), is_chunked=is_chunked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
    assert refused.headers["retry-after"] == "1"
    assert live.metric('dve_admission_rejections_total{reason="server_overloaded"}') == 1
    assert len(live.engine.seen) == 1, "a refused body must not be decoded"
    live.engine.release()
    first.join(20)
    assert post(live, padded("what?", 4096), is_chunked=is_chunked).status_code == 200
    assert live.metric("dve_waiting_body_bytes") == 0


def test_a_body_waits_no_longer_once_the_engine_has_begun(start):
    live = start(**LIMITS)
    body = padded("forever", 4000, stream=True)
    with live.http.stream("POST", CHAT, content=body, headers={"content-type": "application/json"}) as response:
        lines = response.iter_lines()  # kept: once it is collected, the connection is closed
        assert next(lines).startswith("data: ")
        assert live.metric("dve_waiting_body_bytes") == 0
        assert post(live, padded("what?", 4000)).status_code == 200


@pytest.mark.parametrize(
    "body", [b"{", b"[]", json.dumps(ask("bad prepare")).encode(), json.dumps(ask("break")).encode()]
)
def test_whatever_ends_a_request_gives_its_bytes_back(start, body: bytes):
    live = start(**LIMITS)
    assert post(live, body).status_code >= 400
    assert live.metric("dve_waiting_body_bytes") == 0


def test_a_client_that_announces_much_and_sends_nothing_takes_no_room(start):
    """Counted by what is announced, a few idle connections would shut everyone out."""
    import socket
    from urllib.parse import urlsplit

    live = start(**LIMITS)
    where = urlsplit(live.url)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=20) as idle:
        idle.sendall(f"{head}content-length: 4096\r\n\r\n".encode())
        assert post(live, padded("what?", 4096)).status_code == 200


def test_a_full_server_refuses_a_large_body_unread_and_the_connection_goes_on(start):
    live = start(max_num_seqs=1, max_waiting=0)
    live.engine.hold()
    first = threading.Thread(target=live.chat)
    first.start()
    live.engine.wait_until(lambda: live.engine.rows)
    for is_chunked in (False, True):
        refused = post(live, padded("what?", 8_000_000), is_chunked=is_chunked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
        assert "connection" not in refused.headers
        assert live.http.get("/health").status_code == 200
    live.engine.release()
    first.join(20)
    assert post(live, padded("what?", 8_000_000)).status_code == 200
