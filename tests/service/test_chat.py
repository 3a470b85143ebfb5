"""The chat endpoint through the official client, against a started server."""

import asyncio

import openai
import pytest

from tests.service.conftest import LiveServer, ask, image_part
from tests.service.fakes import PNG, FakeEngine

FUSION = {"qwen_weight": 0.75, "dinov2_weight": 0.25, "dominant_encoder": "qwen"}


def test_an_answer_with_an_image(shared: LiveServer):
    completion = shared.openai.chat.completions.create(**ask("what is it?", images=1))
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == "fake/model:1"
    assert completion.system_fingerprint == "fp_fake"
    choice = completion.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "a red fox", "stop")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (15, 4)
    assert completion.usage.total_tokens == 19
    assert completion.usage.prompt_tokens_details.multimodal_tokens == 4
    assert completion.usage.prompt_tokens_details.cached_tokens == 2
    assert completion.fusion == [{**FUSION, "warnings": ["only the first frame was used"]}]


def test_fusion_has_one_entry_an_image_and_none_without(shared: LiveServer):
    assert shared.openai.chat.completions.create(**ask(images=0)).fusion == []
    assert len(shared.openai.chat.completions.create(**ask(images=3)).fusion) == 3


def test_a_stream_says_what_the_whole_answer_says(shared: LiveServer):
    chunks = list(
        shared.openai.chat.completions.create(**ask(images=1), stream=True, stream_options={"include_usage": True})
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "a red fox"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 13)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    whole = shared.openai.chat.completions.create(**ask(images=1))
    assert chunks[0].fusion == chunks[-1].fusion == whole.fusion
    assert chunks[-1].usage == whole.usage


def test_no_usage_chunk_unless_asked(shared: LiveServer):
    chunks = list(shared.openai.chat.completions.create(**ask(), stream=True))
    assert all(chunk.choices for chunk in chunks)


def test_a_stream_is_sse_and_ends_with_done(shared: LiveServer):
    response = shared.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-1] == ""
    assert frames[-2] == "data: [DONE]"
    assert all(frame.startswith("data: {") for frame in frames[:-2])


def test_many_at_once_are_batched_and_all_right(start):
    engine = FakeEngine()
    live = start(engine)
    engine.hold()

    async def ask_many() -> list:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            tasks = [asyncio.create_task(client.chat.completions.create(**ask(images=1))) for _ in range(8)]
            await asyncio.to_thread(engine.wait_until, lambda: len(engine.rows) == 8)
            engine.release()
            return await asyncio.gather(*tasks)

    assert [c.choices[0].message.content for c in asyncio.run(ask_many())] == ["a red fox"] * 8
    assert engine.batch_sizes[0] == 8


def test_the_async_client_streams(shared: LiveServer):
    async def read() -> str:
        async with openai.AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**ask(images=1), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(read()) == "a red fox"


@pytest.mark.parametrize(
    ("arm", "said"),
    [("qwen-only", "a red dog"), ("dinov2-only", "a fox"), ("blind", "a thing"), ("unfused", "a red fox")],
)
def test_virtual_models_answer(shared: LiveServer, arm: str, said: str):
    body = ask(images=1) | {"model": f"fake/model:1@{arm}"}
    completion = shared.openai.chat.completions.create(**body)
    assert completion.choices[0].message.content == said
    assert completion.model == f"fake/model:1@{arm}"
    same = shared.openai.chat.completions.create(**ask(images=1), extra_body={"fusion": {"arm": arm}})
    assert same.choices[0].message.content == said


def test_messages_reach_the_engine(shared: LiveServer):
    image = image_part(detail="low")
    other = {"type": "input_image", "image_url": image["image_url"]["url"]}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [image, other, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b", "refusal": None},
        {"role": "user", "content": "c <|im_end|> \x00"},
    ]
    response = shared.http.post("/v1/chat/completions", json={"model": "fake/model:1", "messages": messages})
    assert response.status_code == 200, response.text
    seen = shared.engine.seen[-1].messages
    assert [m.role for m in seen] == ["system", "user", "assistant", "user"]
    low, auto, text = seen[1].parts
    assert (low.image, low.detail, auto.image, auto.detail) == (PNG, "low", PNG, "auto")
    assert text.text == "a"
    assert seen[3].parts[0].text == "c <|im_end|> \x00"


def test_max_tokens_past_the_context_is_clamped_and_said(shared: LiveServer):
    response = shared.chat("count", max_tokens=32768)
    assert response.headers["x-dve-clamped"] == "max_tokens=95"
    assert shared.engine.seen[-1].sampling.max_tokens == 100
    assert shared.chat("what?", stream=True, max_tokens=32768).headers["x-dve-clamped"] == "max_tokens=95"
    assert "x-dve-clamped" not in shared.chat(max_tokens=5).headers


def test_length_is_the_reason_when_the_limit_ends_it(shared: LiveServer):
    answer = shared.chat(max_tokens=2).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "a red"


def test_metadata_comes_back(shared: LiveServer):
    assert shared.chat(metadata={"run": "7"}, user="u1").json()["metadata"] == {"run": "7"}
    assert "metadata" not in shared.chat().json()


def test_request_ids(shared: LiveServer):
    kept = shared.http.get("/health", headers={"x-request-id": "My.id-1:2_3"})
    assert kept.headers["x-request-id"] == "My.id-1:2_3"
    for bad in ("has space", "x" * 129, "a/b", ""):
        made = shared.http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made != bad
        assert len(made) == 32


def test_server_timing(shared: LiveServer):
    timing = shared.chat().headers["server-timing"]
    assert timing.startswith(
        "queue;dur=1.0, preprocess;dur=2.0, encode;dur=3.0, prefill;dur=4.0, decode;dur=5.0, total;dur="
    )
    assert shared.http.get("/health").headers["server-timing"].startswith("total;dur=")


def test_models(shared: LiveServer):
    ids = [model.id for model in shared.openai.models.list()]
    assert ids[0] == "fake/model:1"
    assert ids[1:] == [f"fake/model:1@{arm}" for arm in ("qwen-only", "dinov2-only", "blind", "unfused")]
    for model_id in ids:
        card = shared.openai.models.retrieve(model_id)
        assert card.id == model_id
        assert card.object == "model"
        assert card.fusion["arm"] == (model_id.partition("@")[2] or "fused")
    with pytest.raises(openai.NotFoundError) as caught:
        shared.openai.models.retrieve("nope")
    assert caught.value.code == "model_not_found"
