"""What each encoder did for one answer: the same question under every arm, and the sums over them.

In: a conversation, and the events that an `Engine` gave for the requests built here. Out: a
`Comparison`. It refuses to know how the requests are run (the Python facade turns the engine itself,
the server goes through its queue), and it holds no torch: these are sums over log-likelihoods.

Formulas (model.md section 6, "without e" as in section 4, "Arms": z_e replaced by its mean). Write
v(S) = log p(answer | S), where the answer is the fused model's own, teacher-forced under each arm, and
S is the set of encoders that could see: both = fused, {q} = qwen-only, {d} = dinov2-only, none = blind.

    reliance     delta_e = v(both) - v(both without e)           in nats; also for each token
    Shapley      phi_q = ((v(q) - v(none)) + (v(both) - v(d))) / 2
                 phi_d = ((v(d) - v(none)) + (v(both) - v(q))) / 2
                 phi_q + phi_d = v(both) - v(none)
    interaction  I = v(both) - v(q) - v(d) + v(none)
                 below 0: either would have done (redundant); above 0: they need each other

`unfused` is answered and scored too, as the floor; it is no coalition and enters no sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from model_core.errors import InvalidRequestError, RequestFailedError
from model_core.types import (
    ARMS,
    Arm,
    ChatMessage,
    FusionWeights,
    GenerationRequest,
    ImagePart,
    SamplingParams,
    TokenEvent,
    VideoPart,
)

#: Which arm stands for which coalition of seeing encoders.
COALITIONS: Mapping[str, Arm] = {"both": "fused", "qwen": "qwen-only", "dinov2": "dinov2-only", "none": "blind"}

#: The arm that is left when an encoder is taken away.
WITHOUT: Mapping[str, Arm] = {"qwen": "dinov2-only", "dinov2": "qwen-only"}


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm: its own answer, and how likely it holds the fused answer to be (nats).

    token_log_likelihoods: of the fused answer's tokens, in order; empty where the fused answer was.
    first_divergence: index of the first token that differs from the fused answer's, None if none does.
    """

    arm: Arm
    answer: TokenEvent
    token_log_likelihoods: tuple[float, ...]
    first_divergence: int | None

    @property
    def log_likelihood(self) -> float | None:
        return sum(self.token_log_likelihoods) if self.token_log_likelihoods else None

    @property
    def log_likelihood_per_token(self) -> float | None:
        total = self.log_likelihood
        return None if total is None else total / len(self.token_log_likelihoods)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The module docstring's sums. Each is None where the fused answer held no token to score.

    Keys of `reliance`, `reliance_by_token` and `shapley` are encoder names.
    """

    arms: Mapping[Arm, ArmResult]
    reliance: Mapping[str, float] | None
    reliance_by_token: Mapping[str, tuple[float, ...]] | None
    shapley: Mapping[str, float] | None
    interaction: float | None
    fusion: tuple[FusionWeights, ...]
    encoder_seconds: Mapping[str, float]


def has_images(messages: Sequence[ChatMessage]) -> bool:
    return any(isinstance(part, (ImagePart, VideoPart)) for message in messages for part in message.parts)


def answer_requests(
    prefix: str, messages: Sequence[ChatMessage], sampling: SamplingParams
) -> dict[Arm, GenerationRequest]:
    """The same question to every arm. Ids are `{prefix}-answer-{arm}`, unique if the prefix is."""
    if not has_images(messages):
        raise InvalidRequestError(
            "there is nothing to compare: the messages hold no image",
            value=f"{len(messages)} message(s), 0 images",
            allowed="messages with at least one image",
            fix="Add a picture to the question",
            param="messages",
        )
    first = GenerationRequest(f"{prefix}-answer-fused", tuple(messages), sampling)
    return {arm: replace(first, request_id=f"{prefix}-answer-{arm}", arm=arm) for arm in ARMS}


def score_requests(
    prefix: str, messages: Sequence[ChatMessage], token_ids: Sequence[int]
) -> dict[Arm, GenerationRequest]:
    """The fused answer, teacher-forced under every arm; `{}` if it is empty.

    Take `token_ids` from the fused answer as they are: they hold the end-of-turn token only if the
    answer really ended there, and a cut-off answer must not be charged for an end it never gave.
    """
    if not token_ids:
        return {}
    first = GenerationRequest(f"{prefix}-score-fused", tuple(messages), score_token_ids=tuple(token_ids))
    return {arm: replace(first, request_id=f"{prefix}-score-{arm}", arm=arm) for arm in ARMS}


def collect_answer(events: Iterable[TokenEvent]) -> TokenEvent:
    """One request's events as one: text and ids joined, the last word on everything else.

    Raises the request's own error if it ended in one, RequestFailedError if it never ended.
    """
    text: list[str] = []
    token_ids: list[int] = []
    answer = None
    for event in events:
        text.append(event.text)
        token_ids.extend(event.token_ids)
        if event.error is not None:
            raise event.error
        answer = event if answer is None else _later(answer, event)
    if answer is None or answer.finish_reason is None:
        raise RequestFailedError("the engine's events ended without a terminal one")
    return replace(answer, text="".join(text), token_ids=tuple(token_ids))


def _later(so_far: TokenEvent, event: TokenEvent) -> TokenEvent:
    return replace(
        event,
        fusion=so_far.fusion if event.fusion is None else event.fusion,
        usage=event.usage or so_far.usage,
        timings=event.timings or so_far.timings,
        score_logprobs=so_far.score_logprobs if event.score_logprobs is None else event.score_logprobs,
    )


def summarise(answers: Mapping[Arm, TokenEvent], scores: Mapping[Arm, TokenEvent]) -> Comparison:
    """`answers` to `answer_requests`, `scores` to `score_requests`, each folded, both with every arm.

    `scores` may be empty (an empty fused answer): then the sums are None. Raises RequestFailedError
    if an arm is missing or was scored over another number of tokens than the fused answer has.
    """
    fused = _of(answers, "fused")
    num_tokens = len(fused.token_ids) if scores else 0
    arms = {arm: _arm_result(arm, _of(answers, arm), fused, _scores(scores, arm, num_tokens)) for arm in ARMS}
    by_token = _reliance_by_token(arms) if num_tokens else None
    shapley, interaction = _shapley(arms)
    return Comparison(
        arms=arms,
        reliance=None if by_token is None else {name: sum(deltas) for name, deltas in by_token.items()},
        reliance_by_token=by_token,
        shapley=shapley,
        interaction=interaction,
        fusion=fused.fusion or (),
        encoder_seconds={} if fused.timings is None else fused.timings.encoder_seconds,
    )


def _of(answers: Mapping[Arm, TokenEvent], arm: Arm) -> TokenEvent:
    if arm not in answers:
        raise RequestFailedError("an arm is missing from the comparison", value=arm, allowed=", ".join(ARMS))
    return answers[arm]


def _scores(scores: Mapping[Arm, TokenEvent], arm: Arm, num_tokens: int) -> tuple[float, ...]:
    if not num_tokens:
        return ()
    logprobs = _of(scores, arm).score_logprobs or ()
    if len(logprobs) != num_tokens:
        raise RequestFailedError(
            f"arm '{arm}' was scored over another number of tokens", value=len(logprobs), allowed=str(num_tokens)
        )
    return logprobs


def _arm_result(arm: Arm, answer: TokenEvent, fused: TokenEvent, logprobs: tuple[float, ...]) -> ArmResult:
    return ArmResult(arm, answer, logprobs, _first_difference(fused.token_ids, answer.token_ids))


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _reliance_by_token(arms: Mapping[Arm, ArmResult]) -> dict[str, tuple[float, ...]]:
    both = arms["fused"].token_log_likelihoods
    return {
        name: tuple(b - w for b, w in zip(both, arms[arm].token_log_likelihoods, strict=True))
        for name, arm in WITHOUT.items()
    }


def _shapley(arms: Mapping[Arm, ArmResult]) -> tuple[dict[str, float] | None, float | None]:
    values = {coalition: arms[arm].log_likelihood for coalition, arm in COALITIONS.items()}
    both, qwen, dinov2, none = values["both"], values["qwen"], values["dinov2"], values["none"]
    if both is None or qwen is None or dinov2 is None or none is None:
        return None, None
    shapley = {
        "qwen": ((qwen - none) + (both - dinov2)) / 2,
        "dinov2": ((dinov2 - none) + (both - qwen)) / 2,
    }
    return shapley, both - qwen - dinov2 + none
