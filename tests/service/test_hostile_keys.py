"""Hostile rows 16 to 19 and 32 where keys are asked for, on raw sockets where no client would send such a thing."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator

import pytest

from service.metrics import Metrics
from service.middleware import RequestScope
from tests.service.conftest import LiveServer, ask, run_server
from tests.service.fakes import FakeEngine
from tests.service.test_auth import INFERENCE, KEYS, TRAINING, bearer
from tests.service.test_bad_input import CHAT, check, post_raw

ANALYZE, COMPARE = "/v1/fusion/analyze", "/v1/encoders/compare"
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def keyed() -> Iterator[LiveServer]:
    with run_server(FakeEngine(), api_keys=KEYS) as live:
        yield live


def send_raw(live: LiveServer, *lines: str | bytes) -> tuple[int, dict[str, str], dict]:
    """Status, headers and JSON body of the answer to a GET or to whatever the first line says."""
    head = b"\r\n".join(line if isinstance(line, bytes) else line.encode() for line in (*lines, "connection: close"))
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=20) as raw:
        raw.sendall(head + b"\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    top, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = top.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest)
    return int(first.split()[1]), headers, json.loads(body) if headers["content-type"] == "application/json" else {}


# Row 16


@pytest.mark.parametrize("where", ["model", "user", "stop", "metadata", "unknown"])
@pytest.mark.parametrize("raw", [b"\\ud800", b"\\udfff", b"\\udc00\\ud800"])
def test_row_16_a_lone_surrogate_anywhere(keyed: LiveServer, where: str, raw: bytes) -> None:
    value = {"k": "@"} if where == "metadata" else "@"
    body = json.dumps(ask() | {where: value}).encode().replace(b"@", raw)
    headers = bearer(INFERENCE) | {"content-type": "application/json"}
    response = keyed.http.post(CHAT, content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("raw", ["%ff", "%ed%a0%80", "%00", "%e2%80%ae", "a%cc%81" * 30])
def test_row_16_odd_text_in_a_query(keyed: LiveServer, raw: str) -> None:
    response = keyed.http.get(f"/fusion-weights?request_id={raw}", headers=bearer(INFERENCE))
    check(response, 404, "request_not_found", "request_id")


# Row 17


@pytest.mark.parametrize("path", [CHAT, ANALYZE, COMPARE])
@pytest.mark.parametrize("model", ["nope", "fake/model:1@nothing", "../fake", "ft:fake/model:1:me::1"])
def test_row_17_unknown_models(shared: LiveServer, path: str, model: str) -> None:
    body = ask(images=1) | {"model": model}
    check(shared.http.post(path, json=body), 404, "model_not_found", "model")


@pytest.mark.parametrize("path", [CHAT, ANALYZE, COMPARE])
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"7", b'"text"', b"nonsense", b"{", b"\xff"])
def test_row_17_no_object(shared: LiveServer, path: str, body: bytes) -> None:
    check(post_raw(shared, body, path=path), 400, "invalid_value")


@pytest.mark.parametrize("path", [CHAT, ANALYZE, COMPARE])
@pytest.mark.parametrize("content_type", ["", "text/plain", "application/xml", "application/jsonx", "json"])
def test_row_17_not_declared_as_json(shared: LiveServer, path: str, content_type: str) -> None:
    check(post_raw(shared, json.dumps(ask()).encode(), content_type, path), 400, "invalid_value")


# Row 18

WRONG = [
    None,
    "",
    "Bearer",
    "Bearer ",
    INFERENCE,
    f"Basic {INFERENCE}",
    f"Token {INFERENCE}",
    f"Bearer {INFERENCE}x",
    f"Bearer {INFERENCE[:-1]}",
    f"Bearer {INFERENCE.upper()}",
    f"Bearer {INFERENCE} {INFERENCE}",
    f"Bearer {INFERENCE},{INFERENCE}",
    f"Bearer x{INFERENCE}",
    "Bearer " + "a" * 60_000,
    "Bearer \u00e9\u00ff",
    "Bearer *",
    "Bearer null",
]


@pytest.mark.parametrize("sent", WRONG)
def test_row_18_no_key_or_a_wrong_one(keyed: LiveServer, sent: str | None) -> None:
    header = [] if sent is None else [f"authorization: {sent}".encode("latin-1")]
    for first in ("GET /v1/models HTTP/1.1", f"GET {JOBS} HTTP/1.1", "GET /nope HTTP/1.1"):
        status, headers, body = send_raw(keyed, first, "host: localhost", *header)
        assert (status, body["error"]["code"], body["error"]["type"]) == (
            401,
            "invalid_api_key",
            "invalid_request_error",
        )
        assert headers["www-authenticate"] == "bearer"
        assert INFERENCE not in body["error"]["message"]


def test_row_18_two_keys_are_none(keyed: LiveServer) -> None:
    both = [f"authorization: Bearer {key}" for key in (INFERENCE, TRAINING)]
    status, _, body = send_raw(keyed, "GET /v1/models HTTP/1.1", "host: localhost", *both)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("sent", [f"bearer {INFERENCE}", f"BEARER  {INFERENCE}"])
def test_row_18_the_scheme_is_in_any_case(keyed: LiveServer, sent: str) -> None:
    assert keyed.http.get("/v1/models", headers={"authorization": sent}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", JOBS), ("GET", f"{JOBS}/x"), ("POST", f"{JOBS}/x/cancel"), ("GET", "/v1/fine_tuning/anything"),
     ("DELETE", "/v1/models/fake/model:1"), ("POST", "/v1/models/fake/model:1/load"),
     ("POST", "/v1/models/fake/model:1/unload"), ("POST", "/v1/models/../fine_tuning/jobs"), ("GET", "/admin")],
)  # fmt: skip
def test_row_18_an_inference_key_on_a_job_route(keyed: LiveServer, method: str, path: str) -> None:
    status, _, body = send_raw(keyed, f"{method} {path} HTTP/1.1", "host: x", f"authorization: Bearer {INFERENCE}")
    assert (status, body["error"]["code"]) == (403, "insufficient_permissions")


@pytest.mark.parametrize("name", ["api_key", "API_KEY", "api-key", "key", "access_token", "authorization", "%6bey"])
@pytest.mark.parametrize("has_header", [False, True])
def test_row_18_a_key_in_the_query(keyed: LiveServer, name: str, has_header: bool) -> None:
    headers = bearer(INFERENCE) if has_header else {}
    response = keyed.http.get(f"/v1/models?{name}={INFERENCE}", headers=headers)
    error = check(response, 401, "invalid_api_key")
    assert "header" in error["message"].lower()
    assert INFERENCE not in response.text


ODD_HOSTS = [
    "evil.example",
    "localhost/health/live?",
    "localhost/health/live#",
    "x/metrics?",
    "localhost:99999",
    "a b",
    "@",
    "[::1",
    "",
    b"\xff\xfe",
    "a" * 10_000,
]


@pytest.mark.parametrize("host", ODD_HOSTS)
def test_row_18_an_odd_host_opens_nothing(keyed: LiveServer, host: str | bytes) -> None:
    """Whoever authorises by a URL that is put together with Host can be led past the gate by it."""
    header = b"host: " + (host if isinstance(host, bytes) else host.encode())
    status, headers, body = send_raw(keyed, "GET /v1/models HTTP/1.1", header)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert headers["www-authenticate"] == "bearer"
    status, _, body = send_raw(keyed, f"GET {JOBS} HTTP/1.1", header, f"authorization: Bearer {INFERENCE}")
    assert (status, body["error"]["code"]) == (403, "insufficient_permissions")


@pytest.mark.parametrize(
    "target",
    ["/health/../v1/models", "/health/..%2fv1/models", "//v1/models", "/v1//models", "/v1/models/", "/V1/MODELS",
     "/v1/models;/health", "/%76%31/models", "http://localhost/v1/models", "/metrics/../v1/models", "/ui/../v1/models",
     "/v1/models?/health", "/v1/models#/health"],
)  # fmt: skip
def test_row_18_no_spelling_of_a_path_leads_past_the_gate(keyed: LiveServer, target: str) -> None:
    status, _, body = send_raw(keyed, f"GET {target} HTTP/1.1", "host: localhost")
    # Below an open prefix there is nothing but what is open; everything else asks for a key.
    assert (status, body["error"]["code"]) in ((401, "invalid_api_key"), (404, "unknown_url"))
    assert status == 401 or target.startswith(("/health/", "/ui/"))


# Row 19


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "*"])
def test_row_19_no_cors(keyed: LiveServer, origin: str) -> None:
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    preflight = keyed.http.options(CHAT, headers=asked)
    check(preflight, 401, "invalid_api_key")
    answers = [preflight, keyed.http.get("/health/live", headers=asked)]
    answers.append(keyed.http.post(CHAT, json=ask(), headers=asked | bearer(INFERENCE)))
    assert [answer.status_code for answer in answers[1:]] == [200, 200]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("sent", ["a" * 129, "a" * 65_536, "a b", "a%0d%0ab", "<b>", "", "\u00e9", "a;b", "a\tb"])
def test_row_19_an_odd_request_id_is_replaced(keyed: LiveServer, sent: str) -> None:
    header = b"x-request-id: " + sent.encode("latin-1")
    status, headers, _ = send_raw(keyed, "GET /health/live HTTP/1.1", "host: x", header)
    assert status == 200
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])


@pytest.mark.parametrize(
    "sent", [b"a\r\nset-cookie: x=1", b"a\r\n set-cookie: x=1", b"a\rset-cookie: x=1", b"a\nx: y", b"\0"]
)
def test_row_19_line_ends_on_the_wire_put_nothing_into_an_answer(keyed: LiveServer, sent: bytes) -> None:
    """They end the header (then the id is what stood before) or the connection (400); none comes back."""
    status, headers, _ = send_raw(keyed, "GET /health/live HTTP/1.1", "host: x", b"x-request-id: " + sent)
    assert (status, headers.get("x-request-id")) in ((200, "a"), (400, None))
    assert "set-cookie" not in headers
    assert "x" not in headers


def test_row_19_a_server_that_lets_line_ends_through_changes_nothing() -> None:
    """The application itself, below any parser."""
    sent: list[dict] = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def keep(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", b"a\r\nset-cookie: x=1")]}
    asyncio.run(RequestScope(app, Metrics())(scope, None, keep))
    headers = dict(sent[0]["headers"])
    assert re.fullmatch(b"[0-9a-f]{32}", headers[b"x-request-id"])
    assert b"set-cookie" not in str(headers).encode()


# Row 32


def test_row_32_random_paths_keys_and_models_add_no_labels(keyed: LiveServer) -> None:
    def labels() -> set[str]:
        return {line.rsplit(" ", 1)[0] for line in keyed.http.get("/metrics").text.splitlines() if line[0] != "#"}

    def roam(first: int) -> None:
        for i in range(first, first + 20):
            known = bearer(INFERENCE)
            assert keyed.http.get(f"/v1/models/m{i}", headers=bearer(f"k{i}")).status_code == 401
            assert keyed.http.get(f"/v1/models/m{i}", headers=known).status_code == 404
            assert keyed.http.post(CHAT, json=ask() | {"model": f"m{i}"}, headers=known).status_code == 404
            assert keyed.http.get(f"/p{i}").status_code == 401
            assert keyed.http.get(f"/p{i}", headers=known).status_code == 403
            assert keyed.http.get(f"/p{i}", headers=bearer(TRAINING)).status_code == 404
            assert keyed.http.get(f"/health/p{i}").status_code == 404

    roam(0)
    labels()
    before = labels()
    roam(1000)
    assert labels() == before
    assert not [line for line in before if INFERENCE in line or "/p1" in line or '"m1' in line]
