"""Request parameters of the chat endpoint: what works reaches the engine, what is ignored is named."""

import openai
import pytest

from tests.service.conftest import LiveServer, ask, image_part

CHAT = "/v1/chat/completions"

SENT = {
    "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": -3, "ignore_eos": True, "min_tokens": 2,
    "presence_penalty": -1.5, "frequency_penalty": 2, "repetition_penalty": 1.25,
}  # fmt: skip


def test_sampling_reaches_the_engine(shared: LiveServer):
    more = {"stop": "END", "stop_token_ids": [3, 5], "logit_bias": {"7": -100, "0": 0.5}, "priority": -4}
    response = shared.chat(max_completion_tokens=9, logprobs=True, top_logprobs=20, **SENT, **more)
    assert response.status_code == 200, response.text
    assert "x-dve-ignored" not in response.headers
    request = shared.engine.seen[-1]
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in SENT} == SENT
    assert (sampling.max_tokens, sampling.stop, sampling.stop_token_ids) == (9, ("END",), (3, 5))
    assert (sampling.logit_bias, sampling.logprobs, request.priority) == ({7: -100.0, 0: 0.5}, 20, -4)


def test_what_is_not_asked_for_is_off(shared: LiveServer):
    """Greedy, no seed, up to the end of the context."""
    assert shared.chat(top_k=-1).status_code == 200
    request = shared.engine.seen[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0.0, 0, None, 100)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (sampling.logprobs, sampling.logit_bias, sampling.stop_token_ids) == (None, {}, ())
    assert (sampling.min_tokens, request.priority, request.request_id.count("-")) == (0, 0, 1)


def test_a_token_that_the_model_does_not_have_is_refused(start):
    """The engine alone knows the vocabulary; its error names the parameter."""
    from model_core.errors import InvalidRequestError
    from tests.service.fakes import FakeEngine

    class Small(FakeEngine):
        def prepare(self, request):
            raise InvalidRequestError("'logit_bias' names a token that the model does not have", param="logit_bias")

    response = start(Small()).chat(logit_bias={"4000000": 1})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "logit_bias")


def test_logprobs_in_openais_shape(shared: LiveServer):
    """A forbidden token's log-probability is no number in JSON: it is written as -9999."""
    asked = {"logprobs": True, "top_logprobs": 3}
    completion = shared.openai.chat.completions.create(**ask(), **asked)
    told = completion.choices[0].logprobs
    assert told.refusal is None
    assert len(told.content) == completion.usage.completion_tokens == 4
    second = told.content[1]
    assert (second.token, second.logprob, second.bytes) == ("<4>", -0.25, [4])
    assert [(t.token, t.logprob, t.bytes) for t in second.top_logprobs] == [
        ("<4>", -0.25, [4]),
        ("<70>", -1.5, [70]),
        ("<71>", -9999.0, [71]),
    ]


def test_logprobs_ride_on_their_chunks(shared: LiveServer):
    whole = shared.openai.chat.completions.create(**ask(), logprobs=True, top_logprobs=1).choices[0].logprobs.content
    chunks = list(shared.openai.chat.completions.create(**ask(), logprobs=True, top_logprobs=1, stream=True))
    assert [c.choices[0].logprobs is None for c in chunks] == [True, False, False, False, False, True]
    streamed = [(c.choices[0].delta.content, c.choices[0].logprobs.content) for c in chunks[1:-1]]
    assert [text for text, _ in streamed] == ["a", " red", " fox", ""]
    assert [one for _, content in streamed for one in content] == whole


def test_logprobs_of_the_chosen_tokens_alone(shared: LiveServer):
    for asked in ({"top_logprobs": 0}, {}):
        told = shared.openai.chat.completions.create(**ask(), logprobs=True, **asked).choices[0].logprobs
        assert [one.top_logprobs for one in told.content] == [[], [], [], []]
    assert shared.chat().json()["choices"][0]["logprobs"] is None
    assert shared.chat(logprobs=False).json()["choices"][0]["logprobs"] is None


def test_ignored_fields_are_named(shared: LiveServer):
    response = shared.chat(
        store=True, tools=[], tool_choice="none", frobnicate=1, n=1, logprobs=False, service_tier=None
    )
    assert response.status_code == 200
    assert set(response.headers["x-dve-ignored"].split(", ")) == {"store", "tools", "tool_choice", "frobnicate"}
    assert "x-dve-ignored" not in shared.chat().headers
    hostile = shared.chat(**{"a\r\nset-cookie: b": 1, "x" * 5000: 2, "fine": 3})
    assert hostile.headers["x-dve-ignored"] == "fine, (and 2 more)"
    assert "set-cookie" not in hostile.headers


@pytest.mark.parametrize("is_stream", [False, True])
def test_ignored_fields_are_named_wherever_they_stand(shared: LiveServer, is_stream: bool):
    part = image_part(uuid="x") | {"cache_control": {"type": "ephemeral"}}
    text = {"type": "text", "text": "a", "annotations": None}
    message = {"role": "user", "content": [part, text], "name": "Ann"}
    more = {"response_format": {"type": "text", "strict": True}}
    more |= {"stream": True, "stream_options": {"include_obfuscation": False}} if is_stream else {}
    response = shared.http.post(CHAT, json={"model": "fake/model:1", "messages": [message], **more})
    assert response.status_code == 200, response.text
    expected = {"messages[0].name", "messages[0].content[0].cache_control", "messages[0].content[0].image_url.uuid"}
    expected |= {"response_format.strict"} | ({"stream_options.include_obfuscation"} if is_stream else set())
    assert set(response.headers["x-dve-ignored"].split(", ")) == expected


def test_common_fields_of_clients_are_tolerated(shared: LiveServer):
    raw = shared.openai.chat.completions.with_raw_response.create(
        **ask(),
        store=False,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        parallel_tool_calls=False,
    )
    names = {"store", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls"}
    assert set(raw.headers["x-dve-ignored"].split(", ")) == names


def test_tools_are_refused_by_name(shared: LiveServer):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError) as caught:
        shared.openai.chat.completions.create(**ask(), tools=[tool])
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")
