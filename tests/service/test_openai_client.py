"""What the official client does by itself: errors as classes, retries, timeouts, parsing, leaving a stream."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from model_core.encoder import DualVisionEncoder
from tests.service.conftest import LiveServer, ask, run_server
from tests.service.fakes import FakeEngine


class Spot(BaseModel):
    row: Literal["top", "bottom"]
    column: int


class Animal(BaseModel):
    kind: Literal["dog", "cat"]
    is_large: bool
    spot: Spot | None


ASKED = {"model": "dve-demo", "messages": [{"role": "user", "content": "what animal is it? answer in JSON"}]}


@pytest.fixture(scope="module")
def demo() -> Iterator[LiveServer]:
    """The demo model itself: what it says under a schema is its own."""
    engine = DualVisionEncoder(device="cpu").engine
    with run_server(FakeEngine(), load=lambda: engine) as live:
        while live.http.get("/health/ready").status_code != 200:
            pass
        yield live


def test_parse_gives_an_object_of_the_asked_class(demo: LiveServer):
    done = demo.openai.chat.completions.parse(
        **ASKED, response_format=Animal, n=2, temperature=1, seed=1, logprobs=True
    )
    assert done.choices[0].finish_reason == "stop"
    assert all(isinstance(choice.message.parsed, Animal) for choice in done.choices)
    assert sum(len(choice.logprobs.content) for choice in done.choices) == done.usage.completion_tokens


def test_the_streaming_helper_parses_as_well(demo: LiveServer):
    whole = demo.openai.chat.completions.parse(**ASKED, response_format=Animal)
    with demo.openai.chat.completions.stream(**ASKED, response_format=Animal) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert kinds >= {"chunk", "content.delta", "content.done"}
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_an_answer_that_was_cut_is_told_as_that(demo: LiveServer):
    with pytest.raises(openai.LengthFinishReasonError):
        demo.openai.chat.completions.parse(**ASKED, response_format=Animal, max_tokens=3)


def test_a_schema_that_can_not_be_kept_to_is_a_bad_request(demo: LiveServer):
    schema = {"name": "x", "schema": {"type": "array", "uniqueItems": True}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        demo.openai.chat.completions.create(
            **ASKED, response_format={"type": "json_schema", "json_schema": schema}, stream=True
        )
    assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format")


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, '{"type": "object"}'),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 1}, "strict": True}}, '{"const": 1}'),
        ({"type": "json_schema", "json_schema": {"name": "a", "description": "b"}}, None),
    ],
)
def test_the_format_reaches_the_engine(shared: LiveServer, form: dict, schema: str | None):
    response = shared.chat(response_format=form)
    assert response.status_code == 200, response.text
    assert "x-dve-ignored" not in response.headers
    wanted = shared.engine.seen[-1].sampling.response_format
    assert wanted is not None
    assert wanted.schema == (schema if form["type"] == "json_schema" else None)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "json_schema"}, "response_format"),
        ({"type": "text", "json_schema": {"name": "a"}}, "response_format"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "a b"}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": []}}, "response_format.json_schema.schema"),
    ],
)
def test_a_broken_format_is_named(shared: LiveServer, form: dict, param: str):
    with pytest.raises(openai.BadRequestError) as caught:
        shared.openai.chat.completions.create(**ask(), response_format=form)
    assert (caught.value.code, caught.value.param) == ("invalid_value", param)


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (ask() | {"temperature": 3}, openai.BadRequestError, "invalid_value"),
        (ask() | {"model": "nope"}, openai.NotFoundError, "model_not_found"),
        (ask("break"), openai.InternalServerError, "request_failed"),
        (ask("memory"), openai.InternalServerError, "out_of_memory"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_errors_have_their_classes_and_are_not_tried_again(start, body: dict, kind: type, code: str, is_stream: bool):
    live = start()
    client = live.openai.with_options(max_retries=3)
    # A row that breaks after its first token breaks inside the stream.
    kind = openai.APIError if is_stream and code == "request_failed" else kind
    with pytest.raises(kind) as caught:
        list(client.chat.completions.create(**body, stream=is_stream))
    assert caught.value.code == code
    assert "secret" not in str(caught.value)
    answered = [
        line for line in live.http.get("/metrics").text.splitlines() if "/v1/chat" in line and "requests" in line
    ]
    assert [line.rsplit(" ", 1)[1] for line in answered if "_created" not in line] == ["1.0"]


def test_an_overloaded_server_is_asked_again_after_the_time_it_said(start):
    live = start(max_num_seqs=1, max_waiting=0)
    live.engine.hold()
    first = threading.Thread(target=live.chat)
    first.start()
    live.engine.wait_until(lambda: live.engine.rows)
    answers: list = []
    client = live.openai.with_options(max_retries=2)
    second = threading.Thread(target=lambda: answers.append(client.chat.completions.create(**ask())))
    second.start()
    refusals = 'dve_admission_rejections_total{reason="server_overloaded"}'
    while live.metric(refusals) == 0:
        pass
    live.engine.release()
    first.join(20)
    second.join(20)
    assert answers[0].choices[0].message.content == "a red fox"
    assert live.metric(refusals) == 1, "it waited as long as Retry-After says, and then there was room"


def test_a_client_that_gives_up_frees_its_place(start):
    live = start(max_num_seqs=1, max_waiting=0)
    live.engine.hold()
    for number, is_stream in enumerate((False, True), start=1):
        with pytest.raises(openai.APITimeoutError):
            live.openai.with_options(timeout=0.2).chat.completions.create(**ask(), stream=is_stream)
        live.engine.wait_until(lambda number=number: len(live.engine.aborted) == number)
    live.engine.release()
    assert live.openai.chat.completions.create(**ask()).choices[0].message.content == "a red fox"


def test_an_async_task_cancelled_in_mid_stream_frees_its_place(start):
    live = start(max_num_seqs=1, max_waiting=0)

    async def talk() -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            has_begun = asyncio.Event()

            async def listen() -> None:
                async for chunk in await client.chat.completions.create(**ask("forever"), stream=True):
                    if chunk.choices[0].delta.content:
                        has_begun.set()

            listening = asyncio.create_task(listen())
            await has_begun.wait()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    asyncio.run(talk())
    live.engine.wait_until(lambda: live.engine.aborted)
    assert live.openai.chat.completions.create(**ask()).choices[0].message.content == "a red fox"
