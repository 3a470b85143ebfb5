"""`n`: several answers to one prompt, in one body or one stream."""

import threading

import openai
import pytest

from tests.service.conftest import LiveServer, ask
from tests.service.fakes import FakeEngine


def test_choices_in_one_body(shared: LiveServer):
    completion = shared.openai.chat.completions.create(**ask("what?", images=1), n=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert {choice.message.content for choice in completion.choices} == {"a red fox"}
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}
    # The prompt counts once, what was generated three times.
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 12, 21)
    assert (usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens_details.multimodal_tokens) == (2, 4)
    assert len(completion.fusion) == 1
    assert shared.engine.seen[-1].request_id == f"{completion.id}-0"
    assert [request.request_id for request in shared.engine.forked[-2:]] == [f"{completion.id}-{i}" for i in (1, 2)]


def test_choices_share_one_preparation(start):
    """A picture is decoded once and its prompt tokenised once, whatever n."""
    live = start()
    assert live.chat("what?", images=2, n=4).status_code == 200
    assert (len(live.engine.seen), len(live.engine.forked), live.engine.num_decoded) == (1, 3, 2)


@pytest.mark.parametrize(
    ("seed", "said"), [(7, ["7", "8", "9"]), (2**63 - 2, [str(2**63 - 2), str(2**63 - 1), str(-(2**63))])]
)
def test_each_choice_has_its_own_seed(shared: LiveServer, seed: int, said: list[str]):
    completion = shared.openai.chat.completions.create(**ask("seed"), n=3, seed=seed, temperature=1)
    assert [choice.message.content for choice in completion.choices] == said
    assert shared.openai.chat.completions.create(**ask("seed"), seed=seed).choices[0].message.content == said[0]
    unseeded = shared.openai.chat.completions.create(**ask("seed"), n=2)
    assert [choice.message.content for choice in unseeded.choices] == ["None", "None"]


def test_choices_in_one_stream(shared: LiveServer):
    asked = {"n": 3, "seed": 1, "logprobs": True}
    whole = shared.openai.chat.completions.create(**ask("seed", images=1), **asked)
    *chunks, last = shared.openai.chat.completions.create(
        **ask("seed", images=1), **asked, stream=True, stream_options={"include_usage": True}
    )
    assert len({chunk.id for chunk in chunks}) == 1
    by_index = {i: [c for c in chunks if c.choices[0].index == i] for i in range(3)}
    for i, own in by_index.items():
        assert own[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in own) == str(i + 1)
        assert [c.choices[0].finish_reason for c in own] == [None] * (len(own) - 1) + ["stop"]
        told = [one for c in own if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
        assert told == whole.choices[i].logprobs.content
    assert (last.choices, last.usage, last.fusion) == ([], whole.usage, whole.fusion)
    # One prompt, one routing: on the first chunk and on the last one.
    assert [hasattr(c, "fusion") for c in chunks] == [True] + [False] * (len(chunks) - 1)


@pytest.mark.parametrize("is_stream", [False, True])
def test_one_choice_that_breaks_ends_all(start, is_stream: bool):
    live = start()
    response = live.chat("break last forever", n=3, stream=is_stream)
    if is_stream:
        assert '"code": "request_failed"' in response.text.split("\n\n")[-2]
        assert "[DONE]" not in response.text
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (500, "request_failed")
    live.engine.wait_until(lambda: not live.engine.rows)
    prefix = live.engine.seen[0].request_id.removesuffix("-0")
    live.engine.wait_until(lambda: set(live.engine.aborted) == {f"{prefix}-0", f"{prefix}-1"})
    assert live.chat().status_code == 200


def test_a_choice_that_can_not_be_prepared_ends_all(start):
    class Second(FakeEngine):
        def fork(self, prepared, request):
            raise KeyError("secret user text")

    live = start(Second())
    assert live.chat("forever", n=2).json()["error"]["code"] == "internal_error"
    live.engine.wait_until(lambda: live.engine.aborted)
    assert live.chat().status_code == 200


def test_the_others_follow_the_first_ones_prompt(start):
    """Added together they would all compute the prompt; once the first has, they find it in the prefix cache."""
    live = start()
    live.engine.hold()
    answered = threading.Thread(target=live.chat, args=("what?",), kwargs={"n": 3})
    answered.start()
    live.engine.wait_until(lambda: len(live.engine.forked) == 2 and live.engine.added)
    assert len(live.engine.added) == 1
    live.engine.release()
    answered.join(20)
    assert len(live.engine.added) == 3


def test_choices_take_a_place_each(start):
    live = start(max_num_seqs=1, max_waiting=1)
    assert live.chat(n=2).status_code == 200
    never = live.chat(n=3)
    assert never.status_code == 400, "waiting would not help"
    assert (never.json()["error"]["code"], never.json()["error"]["param"]) == ("invalid_value", "n")
    live.engine.hold()
    first = threading.Thread(target=live.chat)
    first.start()
    live.engine.wait_until(lambda: live.engine.rows)
    with pytest.raises(openai.InternalServerError) as caught:
        live.openai.chat.completions.create(**ask(), n=2)
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("server_overloaded", "1")
    live.engine.release()
    first.join(20)
    assert live.metric('dve_admission_rejections_total{reason="server_overloaded"}') == 1


def test_the_metrics_count_a_shared_prompt_once(start):
    live = start()
    assert live.chat("what?", images=1, n=3).status_code == 200
    assert live.metric("dve_prompt_tokens_total") == 9
    assert live.metric("dve_generation_tokens_total") == 12
    assert live.metric('dve_request_success_total{finished_reason="stop"}') == 3
    assert live.metric('dve_fusion_weight_count{encoder="qwen"}') == 1
    assert live.metric("dve_visual_tokens_count") == 1
