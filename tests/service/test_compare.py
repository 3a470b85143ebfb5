"""The sums of model_core/analysis/compare.py, without an engine."""

import pytest

from model_core.analysis.compare import answer_requests, collect_answer, score_requests, summarise
from model_core.errors import InvalidRequestError, RequestFailedError
from model_core.types import ARMS, ChatMessage, ImagePart, SamplingParams, TextPart, TokenEvent, Usage

MESSAGES = (ChatMessage("user", (ImagePart(b"x"), TextPart("what?"))),)


def answer(*token_ids: int, scores: tuple[float, ...] | None = None) -> TokenEvent:
    return TokenEvent("r", token_ids=token_ids, finish_reason="stop", score_logprobs=scores)


def test_every_arm_is_asked_the_same():
    sampling = SamplingParams(max_tokens=7)
    requests = answer_requests("p", MESSAGES, sampling)
    assert tuple(requests) == ARMS
    assert len({r.request_id for r in requests.values()}) == len(ARMS)
    assert all(r.arm == arm and r.messages == MESSAGES and r.sampling == sampling for arm, r in requests.items())


def test_every_arm_scores_the_same_ids():
    requests = score_requests("p", MESSAGES, [3, 4])
    assert tuple(requests) == ARMS
    assert all(r.score_token_ids == (3, 4) and r.arm == arm for arm, r in requests.items())
    assert score_requests("p", MESSAGES, []) == {}


def test_text_alone_is_nothing_to_compare():
    with pytest.raises(InvalidRequestError, match="no image"):
        answer_requests("p", (ChatMessage("user", (TextPart("x"),)),), SamplingParams())


def test_the_sums():
    values = {"fused": -1.0, "qwen-only": -3.0, "dinov2-only": -7.0, "blind": -10.0, "unfused": -2.0}
    scores = {arm: answer(scores=(value, value * 2)) for arm, value in values.items()}
    found = summarise({arm: answer(1, 2) for arm in ARMS}, scores)
    v = {arm: 3 * value for arm, value in values.items()}
    assert {arm: result.log_likelihood for arm, result in found.arms.items()} == v
    assert found.arms["blind"].log_likelihood_per_token == v["blind"] / 2
    assert found.reliance == {"qwen": v["fused"] - v["dinov2-only"], "dinov2": v["fused"] - v["qwen-only"]}
    assert found.reliance_by_token["qwen"] == (6.0, 12.0)
    # Efficiency: the values share out exactly what seeing is worth.
    assert sum(found.shapley.values()) == v["fused"] - v["blind"]
    assert found.shapley == {"qwen": 19.5, "dinov2": 7.5}
    assert found.interaction == v["fused"] - v["qwen-only"] - v["dinov2-only"] + v["blind"]


def test_redundant_encoders_interact_below_zero_and_needed_ones_above():
    def interaction(one: float) -> float:
        values = {"fused": -1.0, "qwen-only": one, "dinov2-only": one, "blind": -9.0, "unfused": -1.0}
        return summarise(
            {arm: answer(1) for arm in ARMS}, {arm: answer(scores=(value,)) for arm, value in values.items()}
        ).interaction

    assert interaction(-1.0) < 0 < interaction(-9.0)


def test_an_empty_fused_answer_has_no_sums():
    found = summarise({arm: answer() for arm in ARMS}, {})
    assert (found.reliance, found.shapley, found.interaction) == (None, None, None)
    assert found.arms["fused"].log_likelihood is None
    assert found.arms["fused"].log_likelihood_per_token is None


def test_a_missing_arm_or_a_wrong_length_is_an_error():
    answers = {arm: answer(1, 2) for arm in ARMS}
    scores = {arm: answer(scores=(-1.0, -1.0)) for arm in ARMS}
    with pytest.raises(RequestFailedError, match="missing"):
        summarise({arm: a for arm, a in answers.items() if arm != "blind"}, scores)
    with pytest.raises(RequestFailedError, match="number of tokens"):
        summarise(answers, scores | {"blind": answer(scores=(-1.0,))})


@pytest.mark.parametrize(("other", "where"), [((1, 2), None), ((1, 3), 1), ((1,), 1), ((1, 2, 3), 2), ((), 0)])
def test_first_divergence(other: tuple[int, ...], where: int | None):
    answers = {arm: answer(1, 2) for arm in ARMS} | {"blind": answer(*other)}
    assert summarise(answers, {}).arms["blind"].first_divergence == where


def test_events_fold_into_one():
    events = [
        TokenEvent("r", "a", (1,), fusion=(), usage=Usage(3, 1)),
        TokenEvent("r", "b", (2,)),
        TokenEvent("r", "", (9,), finish_reason="stop", usage=Usage(3, 3)),
    ]
    found = collect_answer(events)
    assert (found.text, found.token_ids, found.fusion, found.usage) == ("ab", (1, 2, 9), (), Usage(3, 3))
    assert found.finish_reason == "stop"
    with pytest.raises(RequestFailedError, match="terminal"):
        collect_answer(events[:2])
    with pytest.raises(RequestFailedError, match="terminal"):
        collect_answer([])
    with pytest.raises(InvalidRequestError):
        collect_answer([*events[:1], TokenEvent("r", error=InvalidRequestError("x"))])
