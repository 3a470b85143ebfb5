"""The gate on a really started server: every route by its scope, refusals before a body, limits, ownership."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.routing import iter_route_contexts

from service.auth import RULES, scope_of
from service.keys import hashed_line
from service.main import build_app
from service.settings import JobSettings, Settings
from tests.service.conftest import LiveServer, ask, run_server
from tests.service.fakes import PNG, FakeEngine
from tests.service.test_bad_input import CHAT, check
from tests.service.test_limits import Clock
from tests.service.test_program import running_program

INFERENCE, SECOND, TRAINING = "sk-dve-inference", "sk-dve-second", "sk-dve-training"
KEYS = ",".join(
    hashed_line(key, scope) for key, scope in ((INFERENCE, "inference"), (SECOND, "inference"), (TRAINING, "training"))
)
PUBLIC = ("/metrics", "/openapi.json")
#: What each route of the app takes. A new route breaks the test below until somebody has said it here.
EXPECTED = {
    **{("GET", path): None for path in ("/health", "/health/live", "/health/ready", "/metrics", "/openapi.json")},
    ("HEAD", "/openapi.json"): None,
    ("POST", "/v1/chat/completions"): "inference",
    ("GET", "/v1/models"): "inference",
    ("GET", "/v1/models/{model_id:path}"): "inference",
    ("DELETE", "/v1/models/{model_id:path}"): "training",
    **{("POST", f"/v1/models/{{model_id:path}}/{verb}"): "training" for verb in ("load", "unload", "rollback")},
    ("GET", "/fusion-weights"): "inference",
    ("POST", "/v1/fusion/analyze"): "inference",
    ("POST", "/v1/encoders/compare"): "inference",
    **{(method, "/v1/files"): "inference" for method in ("GET", "POST")},
    **{(method, "/v1/files/{file_id}"): "inference" for method in ("GET", "DELETE")},
    ("GET", "/v1/files/{file_id}/content"): "inference",
    **{(method, "/v1/fine_tuning/jobs"): "training" for method in ("GET", "POST")},
    ("POST", "/v1/fine_tuning/jobs/validate"): "training",
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): "training",
    **{("POST", f"/v1/fine_tuning/jobs/{{job_id}}/{verb}"): "training" for verb in ("cancel", "pause", "resume")},
    **{("GET", f"/v1/fine_tuning/jobs/{{job_id}}/{of}"): "training" for of in ("events", "checkpoints", "freeze")},
    ("PATCH", "/v1/fine_tuning/jobs/{job_id}/fusion"): "training",
}


def app_routes() -> list[tuple[str, str]]:
    """(method, path) of everything that the app answers, also of what its OpenAPI document leaves out."""
    with tempfile.TemporaryDirectory() as data_dir:
        app, _ = build_app(Settings(data_dir=data_dir), JobSettings(data_dir=data_dir), FakeEngine)
        app.state.parts.desk.store.close()
    return [(method, route.path) for route in iter_route_contexts(app.routes) for method in sorted(route.methods)]


ROUTES = app_routes()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def client_of(live: LiveServer, key: str, **more) -> openai.OpenAI:
    return live.openai.with_options(api_key=key, **more)


@pytest.fixture(scope="module")
def keyed() -> Iterator[LiveServer]:
    with run_server(FakeEngine(), api_keys=KEYS) as live:
        yield live


# Routes


def test_every_route_has_its_scope() -> None:
    assert {route: scope_of(*route, PUBLIC) for route in ROUTES} == EXPECTED


def test_the_document_says_what_takes_a_key(keyed: LiveServer) -> None:
    document = keyed.http.get("/openapi.json").json()
    told = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if operation.get("security") == [{"key": []}]
    }
    # The document has no path converters.
    assert told == {(method, path.replace(":path", "")) for (method, path), scope in EXPECTED.items() if scope}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_every_rule_but_those_of_routes_to_come_covers_a_route() -> None:
    used = {next((rule.path for rule in RULES if rule.covers(*route)), None) for route in ROUTES}
    assert {rule.path for rule in RULES} - used <= {"/ui"}


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if EXPECTED.get(route, "training")])
def test_no_route_answers_without_a_key(keyed: LiveServer, method: str, path: str) -> None:
    for headers in ({}, bearer("wrong"), {"authorization": INFERENCE}):
        response = keyed.http.request(method, path.replace("{model_id:path}", "fake/model:1"), headers=headers)
        check(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-should-retry"] == "false"
        assert response.headers["x-request-id"]


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if not EXPECTED.get(route, "training")])
def test_the_open_ones_take_none(keyed: LiveServer, method: str, path: str) -> None:
    assert keyed.http.request(method, path).status_code in (200, 405)  # starlette's own route has HEAD, ours have not


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/v1/fine_tuning/jobs", "training"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-1/events", "training"),
        ("DELETE", "/v1/models/ft:a", "training"),
        ("POST", "/v1/models/ft:a/load", "training"),
        ("POST", "/v1/models/a/b/unload", "training"),
        ("PATCH", "/v1/models", "training"),
        ("POST", "/health", "training"),
        ("POST", "/metrics", "training"),
        ("GET", "/metrics/", "training"),
        ("GET", "/healthy", "training"),
        ("GET", "/uiX", "training"),
        ("GET", "/", "training"),
        ("GET", "", "training"),
        ("GET", "/docs", "training"),
        ("OPTIONS", "/v1/models", "training"),
        ("get", "/v1/models", "training"),
        ("GET", "/v1/modelsX", "training"),
        ("GET", "//v1/models", "training"),
        ("GET", "/V1/models", "training"),
        ("HEAD", "/v1/models", "inference"),
        ("POST", "/v1/files", "inference"),
        ("GET", "/ui/app.js", None),
    ],
)
def test_what_the_table_does_not_name_takes_the_stricter_scope(method: str, path: str, scope: str | None) -> None:
    assert scope_of(method, path, PUBLIC) == scope


def test_an_inference_key_is_kept_from_what_trains(keyed: LiveServer) -> None:
    for method, path in (("POST", "/v1/fine_tuning/jobs"), ("DELETE", "/v1/models/fake/model:1"), ("GET", "/nope")):
        refused = keyed.http.request(method, path, headers=bearer(INFERENCE))
        check(refused, 403, "insufficient_permissions")
        assert refused.headers["x-should-retry"] == "false"
        assert keyed.http.request(method, path, headers=bearer(TRAINING)).status_code in (400, 404, 405)


def test_a_training_file_takes_a_training_key(keyed: LiveServer) -> None:
    """The gate can't see a form's purpose, so the route itself must ask."""
    refused = keyed.http.post(
        "/v1/files",
        files={"file": ("a.jsonl", b'{"messages": []}\n')},
        data={"purpose": "fine-tune"},
        headers=bearer(INFERENCE),
    )
    check(refused, 403, "insufficient_permissions")


def test_a_websocket_is_closed_before_it_is_open(keyed: LiveServer) -> None:
    sent: list[dict] = []

    async def keep(message: dict) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/models", "headers": [], "query_string": b"", "subprotocols": []}
    asyncio.run(keyed.app(scope, None, keep))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_training_grants_inference(keyed: LiveServer) -> None:
    for key in (INFERENCE, TRAINING):
        assert client_of(keyed, key).chat.completions.create(**ask()).choices[0].message.content == "a red fox"


def test_the_official_client_sees_its_error_classes(keyed: LiveServer) -> None:
    with pytest.raises(openai.AuthenticationError) as unknown:
        client_of(keyed, "wrong", max_retries=3).chat.completions.create(**ask(), stream=True)
    assert (unknown.value.code, unknown.value.status_code) == ("invalid_api_key", 401)
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        client_of(keyed, INFERENCE, max_retries=3).fine_tuning.jobs.list()
    assert (forbidden.value.code, forbidden.value.status_code) == ("insufficient_permissions", 403)
    assert "wrong" not in str(unknown.value)


def test_what_is_public_is_a_setting(start) -> None:
    live = start(api_keys=KEYS, public_paths="/openapi.json")
    check(live.http.get("/metrics"), 401, "invalid_api_key")
    check(live.http.get("/metrics", headers=bearer(INFERENCE)), 403, "insufficient_permissions")
    assert live.http.get("/metrics", headers=bearer(TRAINING)).status_code == 200
    assert live.http.get("/openapi.json").status_code == live.http.get("/health/live").status_code == 200


def test_none_may_be_public(start) -> None:
    live = start(api_keys=KEYS, public_paths="")
    for path in ("/metrics", "/openapi.json", "/"):
        check(live.http.get(path), 401, "invalid_api_key")
    assert Settings(public_paths="").no_key_paths() == ()


def test_a_refusal_comes_before_the_body(keyed: LiveServer) -> None:
    """Who has no key and says that 40 MB will come is answered before any of it has."""
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 40000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(keyed.url.rpartition(":")[2])), timeout=20) as raw:
        raw.sendall(head.encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 401")


# An open server


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST:1", "[::1]:80", "127.1.2.3"])
def test_an_open_server_answers_to_this_machines_names(shared: LiveServer, name: str) -> None:
    assert shared.http.get("/v1/models", headers={"host": name}).status_code == 200
    origin = {"origin": f"http://{name}"}
    assert shared.http.get("/v1/models", headers=origin).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", "10.0.0.1", "localhost.evil.example", "[::2]", "", "[",
     "localhost@evil.example"],
)  # fmt: skip
def test_and_to_no_page_that_a_browser_shows(shared: LiveServer, name: str) -> None:
    """Such a page comes with its own origin, or under a name that was made to point to this machine."""
    check(shared.http.get("/v1/models", headers={"host": name}), 401, "invalid_api_key")
    check(shared.http.post(CHAT, json=ask(), headers={"origin": f"http://{name}"}), 401, "invalid_api_key")
    assert shared.http.get("/health/live", headers={"host": name or "x"}).status_code == 200


def test_an_opaque_origin_is_not_ours(shared: LiveServer) -> None:
    check(shared.http.get("/v1/models", headers={"origin": "null"}), 401, "invalid_api_key")


# Limits


def test_a_keys_rate_ends_in_429_and_its_headers_count_down(start) -> None:
    clock = Clock()
    live = start(api_keys=KEYS, key_requests_per_minute=3, clock=clock)
    told = []
    for _ in range(3):
        answer = live.http.get("/v1/models", headers=bearer(INFERENCE))
        assert answer.status_code == 200
        told.append({name: answer.headers[name] for name in answer.headers if name.startswith("x-ratelimit")})
    assert told[0] == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "20s",
    }
    assert [t["x-ratelimit-remaining-requests"] for t in told] == ["2", "1", "0"]
    refused = live.http.get("/v1/models", headers=bearer(INFERENCE))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "20"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-should-retry" not in refused.headers
    # Neither another key nor a probe suffers, and nobody learns of limits without a key.
    assert live.http.get("/v1/models", headers=bearer(SECOND)).status_code == 200
    for free in (live.http.get("/health"), live.http.get("/v1/models")):
        assert not [name for name in free.headers if name.startswith("x-ratelimit")]
    assert live.metric('dve_admission_rejections_total{reason="rate_limit_exceeded"}') == 1
    assert live.metric('dve_http_requests_total{retry_after="true",route="/v1/models",status="429"}') == 1
    clock.time += 20
    assert live.http.get("/v1/models", headers=bearer(INFERENCE)).status_code == 200


def test_streams_and_errors_carry_the_headers_too(start) -> None:
    live = start(api_keys=KEYS, key_requests_per_minute=60)
    for body in (ask(stream=True), ask() | {"model": "nope"}):
        answer = live.http.post(CHAT, json=body, headers=bearer(INFERENCE))
        assert answer.headers["x-ratelimit-limit-requests"] == "60"


def test_the_official_client_waits_as_long_as_it_is_told(start) -> None:
    clock = Clock()
    live = start(api_keys=KEYS, key_requests_per_minute=30, clock=clock)
    times: list[float] = []

    def note(response: httpx.Response) -> None:
        times.append(time.monotonic())
        if response.status_code == 429:
            clock.time += float(response.headers["retry-after"])

    for _ in range(30):
        assert live.http.get("/v1/models", headers=bearer(INFERENCE)).status_code == 200
    with pytest.raises(openai.RateLimitError) as caught:
        client_of(live, INFERENCE).chat.completions.create(**ask())
    assert (caught.value.code, caught.value.status_code) == ("rate_limit_exceeded", 429)
    assert caught.value.response.headers["retry-after"] == "2"
    with httpx.Client(event_hooks={"response": [note]}) as http:
        patient = client_of(live, INFERENCE, max_retries=1, http_client=http)
        assert patient.chat.completions.create(**ask()).choices[0].message.content == "a red fox"
    assert len(times) == 2
    assert times[1] - times[0] >= 2


def test_only_so_many_of_one_key_at_once(start) -> None:
    live = start(api_keys=KEYS, key_max_concurrent=1)
    with live.http.stream("POST", CHAT, json=ask("forever", stream=True), headers=bearer(INFERENCE)) as running:
        lines = running.iter_lines()
        assert next(lines)
        with pytest.raises(openai.RateLimitError) as caught:
            client_of(live, INFERENCE).chat.completions.create(**ask())
        assert caught.value.code == "concurrency_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert client_of(live, SECOND).chat.completions.create(**ask()).choices
    # The client has gone: its place is free as soon as the server has seen it.
    live.engine.wait_until(lambda: live.engine.aborted)
    assert client_of(live, INFERENCE, max_retries=5).chat.completions.create(**ask()).choices


def test_a_place_is_free_again_however_a_request_ends(start) -> None:
    live = start(api_keys=KEYS, key_max_concurrent=1)
    bodies = (ask("break"), ask("bad prepare"), ask() | {"model": "nope"}, ask("break", stream=True), ask(stream=True))
    for body in bodies * 4:
        response = live.http.post(CHAT, json=body, headers=bearer(INFERENCE))
        assert response.status_code != 429, response.text


def test_wrong_keys_leave_nothing_behind(start) -> None:
    live = start(api_keys=KEYS, key_requests_per_minute=1000, key_max_concurrent=10)
    for i in range(50):
        assert live.http.get("/v1/models", headers=bearer(f"wrong-{i}")).status_code == 401
    assert live.http.get("/v1/models", headers=bearer(INFERENCE)).status_code == 200
    layer = live.app.middleware_stack
    while not hasattr(layer, "_limits"):
        layer = getattr(layer, "_app", None) or layer.app
    assert len(layer._limits) == 1


def test_an_open_server_has_the_limits_as_well(start) -> None:
    live = start(key_requests_per_minute=2, clock=Clock())
    assert [live.http.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]


# What a key owns


def test_an_upload_is_there_for_its_key_alone(keyed: LiveServer) -> None:
    sent = keyed.http.post("/v1/fusion/analyze", files={"file": ("a.png", PNG)}, headers=bearer(INFERENCE))
    file_id = sent.json()["file_id"]
    part = {"type": "image_file", "image_file": {"file_id": file_id}}
    body = ask() | {"messages": [{"role": "user", "content": [part]}]}
    compare = {"messages": body["messages"]}

    def look(key: str) -> list[httpx.Response]:
        with_key = {"headers": bearer(key)}
        return [
            keyed.http.post(CHAT, json=body, **with_key),
            keyed.http.post("/v1/fusion/analyze", json=compare, **with_key),
            keyed.http.post("/v1/encoders/compare", json=compare, **with_key),
            keyed.http.get("/fusion-weights", params={"file_id": file_id}, **with_key),
        ]

    assert [r.status_code for r in look(INFERENCE)] == [200] * 4
    for other in (SECOND, TRAINING):
        for response in look(other):
            assert (response.status_code, response.json()["error"]["code"]) == (404, "file_not_found")


def test_so_are_the_weights_of_a_served_request(keyed: LiveServer) -> None:
    named = bearer(INFERENCE) | {"x-request-id": "mine"}
    assert keyed.http.post(CHAT, json=ask(images=1), headers=named).status_code == 200
    params = {"request_id": "mine"}
    assert keyed.http.get("/fusion-weights", params=params, headers=bearer(INFERENCE)).json()["images"]
    check(
        keyed.http.get("/fusion-weights", params=params, headers=bearer(SECOND)), 404, "request_not_found", "request_id"
    )
    # Who takes the same id hides nothing from its first owner.
    keyed.http.post(CHAT, json=ask(), headers=bearer(SECOND) | {"x-request-id": "mine"})
    assert keyed.http.get("/fusion-weights", params=params, headers=bearer(INFERENCE)).json()["images"]


# A program of its own


def test_keys_of_a_file_hold_in_the_running_program(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(KEYS.replace(",", "\n"))
    program = running_program(f"data_dir={tmp_path}", f"api_keys=@{path}")
    with program as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert client.with_options(api_key=INFERENCE).models.list().data[0].id == "fake/model:1"
