"""Bodies generated from the server's own OpenAPI document, whole and broken: never a 500, never an unshaped error.

Not schemathesis: it asks for ten more packages and can't see that the bodies it makes are judged by more than their
schema. The document is what it would read, so a parameter that is missing there is not tried. Of every body several
broken variants are asked too: making one costs Hypothesis ten times what answering it costs the server.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.main import build_app
from service.settings import JobSettings, Settings
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


ODD_VALUES = (
    None, True, -1, 0, 2**70, -0.5, float("nan"), float("inf"), "", "\x00", "\ud800", "7", [], {}, [[[]]],
    {"type": "x"}, "data:image/png;base64,", "<|im_start|>", "x" * 70_000, [None] * 300,
)  # fmt: skip


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += [(value, key), *nodes(inner)]
    return found


def variants(body: Any, count: int, random: Random) -> Iterator[bytes]:
    """The body, then as many broken ones: a value replaced, dropped or renamed somewhere inside, or bytes changed."""
    text = json.dumps(body)
    yield text.encode()
    for _ in range(count - 1):
        changed = json.loads(text)
        places = nodes(changed)
        if not places or random.random() < 0.2:
            raw = bytearray(text.encode())
            raw[random.randrange(len(raw))] = random.randrange(256)
            yield bytes(raw)
            continue
        container, key = random.choice(places)
        how = random.random()
        if how < 0.7:
            container[key] = random.choice(ODD_VALUES)
        elif how < 0.85:
            del container[key]
        elif isinstance(container, dict):
            container[random.choice(("x", "", "n", "type", "logit_bias"))] = container.pop(key)
        else:
            container.append(container[key])
        yield json.dumps(changed).encode()


class App:
    """An application that is asked without a socket or a client between."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path, "root_path": "",
            "raw_path": path.encode(), "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], told, b"".join(message["body"] for message in sent[1:])


def check(case: object, status: int, headers: dict[str, str], body: bytes) -> None:
    assert status < 500, (case, body)
    if headers["content-type"].startswith("text/event-stream"):
        assert body.endswith(b"data: [DONE]\n\n"), (case, body)
    elif status == 200:
        json.loads(body)
    else:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, (case, body)


def run_bodies(count: int, each: int, seed: int = 0) -> Counter[int]:
    """`count` bodies from the document and `each` - 1 variants of every one, through every POST path."""
    data_dir = tempfile.mkdtemp()
    app, client = build_app(
        Settings(request_timeout_seconds=30, data_dir=data_dir), JobSettings(data_dir=data_dir), FakeEngine
    )
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
    seen: Counter[int] = Counter()
    loop, random, http = asyncio.new_event_loop(), Random(seed), App(app)

    @hypothesis.seed(seed)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def judge(case: tuple[str, Any]) -> None:
        path, whole = case
        for body in variants(whole, each, random):
            answer = loop.run_until_complete(http.post(path, body))
            check((path, body), *answer)
            seen[answer[0]] += 1

    async def life() -> None:
        client.start()
        await client.wait_loaded()

    try:
        loop.run_until_complete(life())
        judge()
        loop.run_until_complete(client.stop())
    finally:
        loop.close()
        app.state.parts.desk.store.close()
        shutil.rmtree(data_dir)
    return seen


def test_a_short_round():
    seen = run_bodies(300, 3)
    assert seen[200] > 10, seen
    assert seen[400] > 100, seen


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_bodies():
    assert sum((run_bodies(100, 10, seed) for seed in range(100)), Counter()).total() >= 100_000
