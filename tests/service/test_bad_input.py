"""Whatever is wrong with a request: its status, its code, the field it names, and the server alive after it."""

import base64
import json

import httpx
import openai
import pytest

from tests.service.conftest import LiveServer, ask, image_part

CHAT = "/v1/chat/completions"


def check(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


def post_raw(live: LiveServer, body: bytes, content_type: str = "application/json", path: str = CHAT) -> httpx.Response:
    return live.http.post(path, content=body, headers={"content-type": content_type})


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b"\xff\xfe", b'{"model":', b"[" * 100_000, b'"text"', b"1"])
def test_a_body_that_is_no_object(shared: LiveServer, body: bytes):
    check(post_raw(shared, body), 400, "invalid_value")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_not_declared_as_json(shared: LiveServer, content_type: str):
    check(post_raw(shared, json.dumps(ask()).encode(), content_type), 400, "invalid_value")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("max_tokens", v) for v in ("-1", "0", "2147483648", "9" * 400, "true", '"7"', "1.5", "NaN", "[]")),
        *(("temperature", v) for v in ("3", "-0.1", "NaN", "Infinity", "1e999", "true", '"1"')),
        *(("top_p", v) for v in ("0", "1.1", "NaN")),
        *(("top_k", v) for v in ("-2", "1.5")),
        *(("min_p", v) for v in ("-1", "2")),
        *(("seed", v) for v in (str(2**70), "true", "0.5")),
        *(("stop", v) for v in ('["a","b","c","d","e"]', "[1]", '""', "7")),
        *(("stream", v) for v in ('"yes"', "1")),
        *(("metadata", v) for v in ('{"a": 1}', "[]", json.dumps({"k" * 65: ""}))),
        *(("n", v) for v in ("0", "9", "1000000000", "true", "1.5")),
        *(("min_tokens", v) for v in ("-1", "101", "1.5")),
        *((f"{p}_penalty", v) for p in ("presence", "frequency") for v in ("-2.1", "3", "NaN", "true")),
        *(("repetition_penalty", v) for v in ("0", "-1", "2.5", "Infinity")),
        *(("stop_token_ids", v) for v in ("[-1]", '["1"]', "[true]", "7", json.dumps([1] * 65), f"[{2**31}]")),
        *(("logprobs", v) for v in ("1", "0", '"yes"')),
        *(("top_logprobs", v) for v in ("-1", "21", "true")),
        *(("priority", v) for v in ("0.5", str(2**31), "true")),
        *(("logit_bias", v) for v in ("[]", '{"a": 1}', '{"1": 101}', '{"1": NaN}', '{"01": 1}', '{"-1": 1}')),
        ("logit_bias", json.dumps({str(i): 1 for i in range(1025)})),
        ("user", "7"),
        ("messages", "[]"),
        ("messages", '"hello"'),
        ("model", "7"),
        ("model", '""'),
    ],
)
def test_a_parameter_out_of_range_is_named(shared: LiveServer, name: str, text: str):
    body = json.dumps(ask() | {name: "@"}).replace('"@"', text)
    param = check_named(post_raw(shared, body.encode()))
    # An element or a key of the parameter may be named more exactly.
    assert param == name or param.startswith((f"{name}[", f"{name}."))


def check_named(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_value"
    return response.json()["error"]["param"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]), ("functions", [{}]), ("tool_choice", "required"),
        ("function_call", {"name": "f"}), ("audio", {"voice": "x"}), ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}), ("reasoning_effort", "low"), ("verbosity", "low"),
        ("web_search_options", {}), ("web_search_options", {"search_context_size": "low"}),
    ],
)  # fmt: skip
def test_a_parameter_that_would_be_ignored_is_refused(shared: LiveServer, name: str, value: object):
    check(shared.chat(**{name: value}), 400, "unsupported_parameter", name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1), ("n", None), ("logprobs", False), ("top_logprobs", 0), ("logit_bias", {}), ("presence_penalty", 0.0),
        ("repetition_penalty", 1), ("min_tokens", 0), ("modalities", ["text"]), ("tools", []), ("priority", 0),
        ("response_format", {"type": "text"}), ("temperature", None), ("stop", None), ("stop", []), ("stream", False),
        ("stream_options", None), ("max_tokens", None), ("reasoning_effort", None), ("logit_bias", None),
        ("stop_token_ids", []), ("logprobs", None), ("repetition_penalty", None), ("web_search_options", None),
    ],
)  # fmt: skip
def test_a_neutral_value_is_accepted(shared: LiveServer, name: str, value: object):
    assert shared.chat(**{name: value}).status_code == 200


def test_combinations_that_contradict_each_other(shared: LiveServer):
    check(shared.chat(max_tokens=1, max_completion_tokens=2), 400, "invalid_value", "max_tokens")
    check(shared.chat(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options")
    for logprobs in ({}, {"logprobs": None}, {"logprobs": False}):
        check(shared.chat(top_logprobs=1, **logprobs), 400, "invalid_value", "top_logprobs")
    check(shared.chat(max_tokens=2, min_tokens=3), 400, "invalid_value", "min_tokens")
    virtual = {"model": "fake/model:1@blind", "fusion": {"arm": "qwen-only"}}
    check(shared.http.post(CHAT, json=ask() | virtual), 400, "invalid_value", "fusion.arm")


def test_unknown_keys_inside_fusion_are_refused(shared: LiveServer):
    check(shared.chat(fusion={"maps": True}), 400, "unknown_parameter", "fusion.maps")
    check(shared.chat(fusion={"arm": "both"}), 400, "invalid_value", "fusion.arm")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "<|im_start|>", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "audio"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": 7}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].image_url"),
        ({"role": "user", "content": [image_part(detail="huge")]}, "messages[0].content[0].image_url.detail"),
        ("x", "messages[0]"),
    ],
)
def test_a_broken_message_is_named(shared: LiveServer, message: object, param: str):
    body = {"model": "fake/model:1", "messages": [message]}
    check(shared.http.post(CHAT, json=body), 400, "invalid_value", param)


def test_tool_calls_in_a_message_are_refused(shared: LiveServer):
    message = {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}
    body = {"model": "fake/model:1", "messages": [message]}
    check(shared.http.post(CHAT, json=body), 400, "unsupported_parameter", "messages[0].tool_calls")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        *((u, "invalid_image_url") for u in ("http://127.0.0.1/x.png", "https://example.com/x.png", "file:///etc/passwd",
          "/etc/passwd", "gopher://x", "", "iVBORw0KGgo=", "http://allowed.com\\@127.0.0.1/", "C:\\x.png")),
        *((f"data:image/png{u}", "invalid_base64_image") for u in (
            ",xyz", ";base64", ";base64,@@@@", ";base64,iVBORw0KGgo", ";base64,iVBO\nRw0K", ";base64,\u00e9\u00e9")),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:image/png;base64,AAAA", "image_parse_error"),
    ],
)  # fmt: skip
def test_an_image_that_can_not_be_read(shared: LiveServer, url: str, code: str):
    body = ask() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    response = shared.http.post(CHAT, json=body)
    param = "messages" if code == "image_parse_error" else "messages[0].content[0].image_url.url"
    error = check(response, 400, code, param)
    # What a client sent is not repeated: it may be megabytes, or a path to probe with.
    assert not url or len(url) < 9 or url not in error["message"]


def test_image_limits(start):
    live = start(max_images=2, max_image_bytes=100)
    assert live.chat(images=2).status_code == 200
    check(live.chat(images=3), 400, "invalid_value", "messages")
    for size, is_allowed in ((100, True), (101, False), (5000, False)):
        data = b"\x89PNG".ljust(size, b"x")
        body = ask() | {"messages": [{"role": "user", "content": [image_part(data)]}]}
        response = live.http.post(CHAT, json=body)
        if is_allowed:
            assert response.status_code == 200
        else:
            check(response, 400, "image_file_too_large", "messages[0].content[0].image_url.url")
    assert live.metric('dve_media_rejected_total{reason="image_file_too_large"}') == 2


def test_unknown_models(shared: LiveServer):
    for model in ("gpt-4o", "fake/model:1@nothing", "fake/model:1@fused", "fake/model"):
        with pytest.raises(openai.NotFoundError) as caught:
            shared.openai.chat.completions.create(**ask() | {"model": model})
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_prompt_past_the_context(shared: LiveServer):
    check(shared.chat("x" * 101), 400, "context_length_exceeded", "messages")
    # So long that it is not even tokenised.
    num_seen = len(shared.engine.seen)
    check(shared.chat("x" * 25_601), 400, "context_length_exceeded", "messages")
    assert len(shared.engine.seen) == num_seen


def test_too_many_messages_and_parts(shared: LiveServer):
    body = ask() | {"messages": [{"role": "user", "content": "x"}] * 1000}
    check(shared.http.post(CHAT, json=body), 400, "invalid_value", "messages")
    body = ask() | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 10_000}]}
    check(shared.http.post(CHAT, json=body), 400, "invalid_value", "messages[0].content")


def test_unknown_paths_and_methods(shared: LiveServer):
    check(shared.http.get("/nope"), 404, "unknown_url")
    check(shared.http.get("/v1/models/"), 404, "model_not_found", "model")
    check(shared.http.get("/health/"), 404, "unknown_url")
    wrong = shared.http.get(CHAT)
    check(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert shared.http.patch("/v1/models/fake/model:1").headers["allow"] == "DELETE, GET"
    assert shared.http.patch("/v1/fine_tuning/jobs").headers["allow"] == "GET, POST"
    assert shared.http.patch("/v1/models/fake/model:1/load").headers["allow"] == "POST"


def test_lone_surrogates(shared: LiveServer):
    body = json.dumps(ask("@")).replace("@", "\\ud800")
    check(post_raw(shared, body.encode()), 400, "invalid_value")
    check(post_raw(shared, json.dumps(ask() | {"model": "\ud83d\ude00"}).encode()), 404, "model_not_found", "model")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_cap(start, is_chunked: bool):
    live = start(max_body_bytes=4096, max_image_bytes=1024)
    body = json.dumps(ask("x" * 8192)).encode()
    pieces = (body[i : i + 512] for i in range(0, len(body), 512))
    response = live.http.post(
        CHAT, content=pieces if is_chunked else body, headers={"content-type": "application/json"}
    )
    check(response, 413, "request_too_large")
    assert live.chat().status_code == 200


def test_an_unexpected_error_shows_nothing_of_itself(shared: LiveServer, caplog: pytest.LogCaptureFixture):
    response = shared.chat("bad prepare", stream=True)
    error = check(response, 500, "internal_error")
    assert response.headers["x-request-id"] in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text
    assert "secret" not in caplog.text
    assert shared.chat().status_code == 200


@pytest.mark.parametrize(
    "parts",
    [
        {"files": {"other": b"x"}},
        {"data": {"file": "text"}},
        {"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]},
        {"files": {"file": ("a", b"x")}, "data": {f"f{i}": "x" for i in range(100)}},
        {"files": {"file": ("a", b"x")}, "data": {"question": "x" * 100_000}},
        {"files": {"file": ("a", b"x")}, "data": {"maps": "1"}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    ],
)
def test_broken_forms(shared: LiveServer, parts: dict):
    response = shared.http.post("/v1/fusion/analyze", **parts)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_value"


def test_bad_uploads(shared: LiveServer):
    check(shared.http.post("/v1/fusion/analyze", files={"file": ("a", b"")}), 400, "empty_image_file", "file")
    check(shared.http.post("/v1/fusion/analyze", files={"file": ("a", b"GIF")}), 400, "image_parse_error", "file")


def test_base64_is_decoded_as_it_was_encoded(shared: LiveServer):
    for length in range(4, 10):
        data = b"\x89PNG123456"[:length]
        shared.http.post(CHAT, json=ask() | {"messages": [{"role": "user", "content": [image_part(data)]}]})
        assert shared.engine.seen[-1].messages[0].parts[0].image == data
        assert base64.b64encode(data)


def content(*parts: object) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("change", "seen", "allowed", "fix"),
    [
        ({"messages": []}, "a list of 0", "at least 1 item", "Add to it"),
        ({"messages": [{}]}, "nothing", "a value", "Add 'messages[0].role'"),
        ({"messages": "x"}, "x", "a valid array", "Change 'messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool", "'system', 'developer'", "Change 'messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "null", "a valid array", "Change 'messages"),
        (content(), "a list of 0", "at least 1 item", "Add to it"),
        ({"max_tokens": 0}, "0", "greater than or equal to 1", "Change 'max_tokens' to that"),
        ({"max_tokens": True}, "true", "a valid integer", "Change 'max_tokens'"),
        ({"temperature": 3}, "3", "less than or equal to 2", "Change 'temperature'"),
        ({"stop": ["a"] * 5}, "a list of 5", "at most 4 items", "Send fewer"),
        ({"fusion": {"arm": {"b": 1}}}, "an object", "'fused', 'qwen-only'", "Change 'fusion.arm'"),
        (content({"type": "text", "text": "x" * 25_601}), "25601 characters", "100 tokens", "Shorten the conversation"),
        (content(image_part(b"")), "0 bytes", "an encoded image", "Check that the file was written"),
        (content({"type": "image_url", "image_url": {"url": "data:image/png,x"}}), "16 char", "data:<media", "Encode"),
        (content({"type": "image_url", "image_url": {"url": "data:;base64,@@@@"}}), "4 char", "the standard", "Encode"),
        (content({"type": "input_image"}), "none, or two", "'image_url' or 'file_id'", "Give one"),
        (content(*[image_part()] * 40), "40", "at most ", "Send fewer"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_seen_what_is_allowed_and_what_to_do(
    shared: LiveServer, change: dict, seen: str, allowed: str, fix: str
):
    message = shared.http.post(CHAT, json=ask() | change).json()["error"]["message"]
    for part in (f"Got: {seen}", f"Allowed: {allowed}", f". {fix}"):
        assert part in message


@pytest.mark.parametrize(("body", "content_type"), [(b"{", "application/json"), (b"{}", "text/plain")])
def test_a_body_that_can_not_be_read_says_what_to_send(shared: LiveServer, body: bytes, content_type: str):
    message = post_raw(shared, body, content_type).json()["error"]["message"]
    assert "Got: " in message
    assert "Allowed: one JSON object" in message or "Allowed: content-type: application/json. Send" in message
