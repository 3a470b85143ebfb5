"""Row 33: whatever a browser is shown of this server is data. Every answer says so, the edge's own refusals too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest

from service.metrics import Metrics
from service.middleware import RequestScope
from tests.service.conftest import LiveServer, ask, image_part, run_server
from tests.service.fakes import PNG, FakeEngine
from tests.service.sockets import SHORT, exchange
from tests.service.test_auth import ROUTES

CHAT = "/v1/chat/completions"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
EXPECTED = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
DATA = ("application/json", "text/event-stream; charset=utf-8", "text/plain")


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with run_server(FakeEngine(), edge=SHORT, body_seconds=0.3, max_body_bytes=65_536) as server:
        yield server


def check_data(answer: httpx.Response) -> None:
    for name, value in EXPECTED.items():
        assert answer.headers.get_list(name) == [value], (name, answer.request.url)
    assert answer.headers["content-type"].startswith(DATA), answer.headers["content-type"]
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_answers_with_them(live: LiveServer, method: str, path: str) -> None:
    filled = path.replace("{model_id:path}", "fake/model:1").replace("{", "").replace("}", "")
    check_data(live.http.request(method, filled))


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/ui", "/", "/nope.html", f"/{MARKUP}", "/favicon.ico"])
def test_there_is_no_page_yet_and_none_by_mistake(live: LiveServer, path: str) -> None:
    answer = live.http.get(path, headers={"accept": "text/html"})
    assert answer.status_code == 404
    check_data(answer)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (ask(), 200),
        (ask(images=1, stream=True), 200),
        (ask() | {"model": MARKUP}, 404),
        (ask() | {"temperature": MARKUP}, 400),
        (ask(MARKUP * 9), 400),
        (ask() | {"messages": [{"role": "user", "content": [image_part(b"no picture")]}]}, 400),
        (ask("x" * 70_000), 413),
    ],
)
def test_chats_and_their_errors_have_them(live: LiveServer, body: dict, status: int) -> None:
    answer = live.http.post(CHAT, json=body)
    assert answer.status_code == status
    check_data(answer)


def test_a_picture_and_an_error_inside_a_stream_have_them(live: LiveServer) -> None:
    check_data(live.http.post("/v1/fusion/analyze", files={"file": ("<b>.png", PNG, "text/html")}))
    check_data(live.http.get("/fusion-weights", params={"file_id": MARKUP}))


def test_who_is_refused_at_the_door_is_told_too(live: LiveServer) -> None:
    check_data(live.http.get("/v1/models", headers={"host": "evil.example"}))


@pytest.mark.parametrize(
    "sent",
    [b"<script>\r\n\r\n", b"GET /<b> HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 4096, b"GET / HTTP/1.1\r\nhos"],
)
def test_the_edges_own_refusals_have_them(live: LiveServer, sent: bytes) -> None:
    head, _, body = exchange(live, sent).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")[1:]
    for name, value in EXPECTED.items():
        assert [line for line in lines if line.startswith(f"{name}:")] == [f"{name}: {value}"]
    assert "content-type: application/json" in lines
    assert json.loads(body)["error"]["code"] in ("invalid_http_request", "headers_too_large", "request_timeout")


def test_a_pages_own_policy_stands() -> None:
    """The page will need scripts of its own; what it says of itself is not doubled, and the rest stays."""
    sent: list[dict] = []
    own = (b"content-security-policy", b"default-src 'self'")

    async def page(_scope: object, _receive: object, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [own]})
        await send({"type": "http.response.body", "body": b""})

    async def keep(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/ui", "headers": []}
    asyncio.run(RequestScope(page, Metrics())(scope, None, keep))
    names = [name for name, _ in sent[0]["headers"]]
    assert sent[0]["headers"].count(own) == 1
    assert sorted(names) == sorted(
        [own[0], b"x-content-type-options", b"referrer-policy", b"x-request-id", b"server-timing"]
    )
