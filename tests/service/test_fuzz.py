"""Bodies generated from the server's own OpenAPI document, whole and broken: never a 500, never an unshaped error.

Not schemathesis: it asks for ten more packages and can't see that the bodies it makes are judged by more than their
schema. The document is what it would read, so a parameter that is missing there is not tried.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import string
import tempfile
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.main import build_app
from service.settings import Settings
from tests.service.conftest import ask, image_part
from tests.service.fakes import FakeEngine
from tests.service.jobs.player import add_file

ODD_TEXT = st.text(max_size=12) | st.sampled_from(
    ["<|im_start|>", "\x00", "data:image/png;base64,", "file:///etc", "-1"]
)
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | ODD_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3),
    max_leaves=6,
)
#: A picture and texts that the engine answers, so that not every body ends at its messages.
KNOWN = {
    "model": st.sampled_from(["fake/model:1", "fake/model:1@blind", "nope"]),
    "messages": st.sampled_from([ask()["messages"], ask("count", 1)["messages"], [{"role": "user", "content": "hi"}]]),
    "url": st.sampled_from([image_part()["image_url"]["url"], "http://127.0.0.1/x", "data:;base64,AA"]),
    "training_file": st.sampled_from(["file-1", "file-1", "file-none"]),
    "schema": st.sampled_from([{"type": "object"}, {"enum": [1]}, {"$ref": "http://x"}, {}]),
}


def strategy(schema: dict[str, Any], document: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that the schema allows, or mostly allows."""
    if "$ref" in schema:
        return strategy(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], document, depth)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of([strategy(option, document, depth) for option in options])
    kind = schema.get("type")
    if kind == "object":
        return objects(schema, document, depth)
    if kind == "array":
        inner = strategy(schema.get("items", {}), document, depth + 1)
        return st.lists(inner, min_size=min(schema.get("minItems", 0), 3), max_size=3)
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", -5)), schema.get("maximum", 5)
        return st.integers(int(low), max(int(low), int(high))) | (
            st.floats(low, max(low, high)) if kind == "number" else st.nothing()
        )
    plain = {
        "string": st.text(string.printable, min_size=schema.get("minLength", 0), max_size=8),
        "boolean": st.booleans(),
    }
    return plain.get(str(kind), st.none() if kind == "null" else ODD)


def objects(schema: dict[str, Any], document: dict[str, Any], depth: int) -> st.SearchStrategy[dict[str, Any]]:
    if "properties" not in schema:
        more = schema.get("additionalProperties")
        inner = strategy(more, document, depth + 1) if isinstance(more, dict) else ODD
        return st.dictionaries(st.sampled_from(["0", "7", "a", "k"]), inner, max_size=2)
    fields = {n: KNOWN[n] if n in KNOWN else strategy(s, document, depth + 1) for n, s in schema["properties"].items()}
    required = {n: s for n, s in fields.items() if n in schema.get("required", ())}
    optional = {n: s for n, s in fields.items() if n not in required}
    return st.fixed_dictionaries(required, optional=optional)


def broken(whole: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One field replaced or added, one body in three; sometimes all of it."""

    def change(pair: tuple[Any, str | None, Any]) -> Any:
        body, extra, value = pair
        if isinstance(body, dict) and body:
            return body | {extra or sorted(body)[len(str(value)) % len(body)]: value}
        return value

    return whole | whole | st.tuples(whole, st.none() | ODD_TEXT, ODD).map(change) | ODD


def run_bodies(count: int) -> dict[int, int]:
    """`count` bodies through every POST path of one application, without a socket between."""
    data_dir = tempfile.mkdtemp()
    app, client = build_app(Settings(request_timeout_seconds=30, data_dir=data_dir), FakeEngine)
    add_file(app.state.parts.desk.store)
    document = app.openapi()
    paths = {
        path: broken(strategy(item["post"]["requestBody"]["content"]["application/json"]["schema"], document))
        for path, item in document["paths"].items()
        if "application/json" in item.get("post", {}).get("requestBody", {}).get("content", {})
    }
    assert {"/v1/chat/completions", "/v1/fine_tuning/jobs"} <= set(paths)
    # Its answer is a process's, and takes as long as one.
    del paths["/v1/fine_tuning/jobs/validate"]
    cases = st.one_of([st.tuples(st.just(path), bodies) for path, bodies in paths.items()])
    seen: dict[int, int] = {}
    loop = asyncio.new_event_loop()
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    http = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(cases)
    def judge(case: tuple[str, Any]) -> None:
        path, body = case
        headers = {"content-type": "application/json"}
        response = loop.run_until_complete(http.post(path, content=json.dumps(body).encode(), headers=headers))
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
        assert response.status_code < 500 or response.status_code in (503, 504), (case, response.text)
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n"), (case, response.text)
        elif response.status_code == 200:
            response.json()
        else:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, (case, response.text)

    async def life() -> None:
        client.start()
        await client.wait_loaded()

    try:
        loop.run_until_complete(life())
        judge()
        loop.run_until_complete(http.aclose())
        loop.run_until_complete(client.stop())
    finally:
        loop.close()
        app.state.parts.desk.store.close()
        shutil.rmtree(data_dir)
    return seen


def test_a_short_round():
    seen = run_bodies(500)
    assert seen.get(200, 0) > 20, seen
    assert seen.get(400, 0) > 20, seen


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_bodies():
    assert sum(run_bodies(100_000).values()) >= 100_000
