"""Keys: pictures are their key's own, everything about training takes a training key, quotas are each key's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import httpx
import pytest

from tests.service.conftest import LiveServer
from tests.service.jobs.rows import PICTURE, jsonl

KEYS = {name: f"sk-{name}" for name in ("trainer", "other", "reader", "visitor")}
SCOPES = {"trainer": "training", "other": "training", "reader": "inference", "visitor": "inference"}
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def ask(start: Callable[..., LiveServer]) -> Callable[..., httpx.Response]:
    lines = [f"{SCOPES[name]}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in KEYS.items()]
    live = start(api_keys=",".join(lines), max_active_jobs_per_key=1)

    def ask(who: str, method: str, path: str, **more) -> httpx.Response:
        return live.http.request(method, path, headers={"authorization": f"Bearer {KEYS[who]}"}, **more)

    return ask


def test_pictures_are_their_keys_own(ask: Callable[..., httpx.Response]) -> None:
    upload = {"files": {"file": ("a.png", PICTURE)}, "data": {"purpose": "vision"}}
    picture = ask("reader", "POST", "/v1/files", **upload).json()["id"]
    for who in ("visitor", "trainer"):
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert ask(who, method, f"/v1/files/{picture}{path}").status_code == 404, (who, method)
        assert ask(who, "GET", "/v1/files").json()["data"] == []
        assert ask(who, "GET", "/fusion-weights", params={"file_id": picture}).status_code == 404
    assert ask("reader", "GET", f"/v1/files/{picture}/content").content == PICTURE
    assert ask("reader", "GET", "/fusion-weights", params={"file_id": picture}).status_code == 200
    assert ask("reader", "DELETE", f"/v1/files/{picture}").status_code == 200


def test_training_takes_a_training_key(ask: Callable[..., httpx.Response]) -> None:
    upload = {"files": {"file": ("a.jsonl", jsonl())}, "data": {"purpose": "fine-tune"}}
    refused = ask("reader", "POST", "/v1/files", **upload)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
    file_id = ask("trainer", "POST", "/v1/files", **upload).json()["id"]
    assert ask("reader", "GET", f"/v1/files/{file_id}").status_code == 404
    assert ask("other", "GET", f"/v1/files/{file_id}").status_code == 200, "keys change, training data stays"
    body = {"model": "fake/model:1", "training_file": file_id}
    assert ask("reader", "POST", JOBS, json=body).status_code == 403
    job = ask("trainer", "POST", JOBS, json=body).json()["id"]
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events?stream=true"), ("PATCH", "/fusion")):
        assert ask("reader", method, f"{JOBS}/{job}{path}").status_code == 403, path
    assert ask("other", "GET", f"{JOBS}/{job}").status_code == 200
    full = ask("trainer", "POST", JOBS, json=body)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "quota_exceeded")
    assert ask("other", "POST", JOBS, json=body).status_code == 200
