"""With messages.py the only file that knows both vocabularies: the wire's and `model_core.types`.

In: validated bodies and the loaded model's `ModelInfo`. Out: SamplingParams, GenerationRequests; and
back from TokenEvents to JSON objects (fusion weights and comparisons: reports.py). It refuses to run anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from model_core.analysis.compare import collect_answer
from model_core.errors import InvalidRequestError, InvalidSchemaError, ModelNotFoundError, RequestFailedError
from model_core.types import (
    ARMS,
    Arm,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    ResponseFormat,
    SamplingParams,
    Timings,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from service.protocol import chat as protocol
from service.protocol.chat import ChatCompletionRequest, check_supported
from service.protocol.completion import (
    AssistantMessage,
    ChatCompletion,
    Choice,
    CompletionUsage,
    PromptTokensDetails,
)
from service.protocol.fusion import DEFAULT_COMPARE_TOKENS, CompareRequest
from service.protocol.models import ModelCard, ModelFusion
from service.reports import STAGES, fusion_entries

#: What turns a token's id into its text and its bytes.
TokenText = Callable[[int], tuple[str, list[int]]]

#: JSON has no infinity; a forbidden token's log-probability is written as vLLM writes it.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """What a chat body asks for, without its messages. `model` is the id as the client spelt it."""

    model: str
    arm: Arm
    sampling: SamplingParams
    num_choices: int
    priority: int
    is_stream: bool
    include_usage: bool
    requested_max_tokens: int | None
    ignored: tuple[str, ...]
    metadata: Mapping[str, str] | None
    user: str | None


def resolve_model(info: ModelInfo, name: str | None) -> tuple[str, Arm]:
    """The id to answer under and the arm behind it. No name means the model itself."""
    if name is None or name == info.model_id:
        return info.model_id, "fused"
    for arm in ARMS[1:]:
        if name == f"{info.model_id}@{arm}":
            return name, arm
    raise ModelNotFoundError(
        "there is no such model", value=name, allowed=", ".join(card.id for card in model_cards(info)),
        fix="GET /v1/models lists all", param="model",
    )  # fmt: skip


def plan_chat(body: ChatCompletionRequest, info: ModelInfo) -> ChatPlan:
    """Raises ModelNotFoundError, UnsupportedParameterError, InvalidRequestError."""
    ignored = check_supported(body)
    model, arm = resolve_model(info, body.model)
    asked = body.fusion.arm if body.fusion is not None else None
    if asked is not None and arm not in ("fused", asked):
        raise InvalidRequestError(
            "'fusion.arm' and 'model' name two arms",
            value=f"{asked} and {arm}",
            allowed="one of them, or the same arm",
            fix="Leave 'fusion.arm' out, or the @ and what follows it in 'model'",
            param="fusion.arm",
        )
    return ChatPlan(
        model=model,
        arm=asked or arm,
        sampling=_chat_sampling(body, info),
        num_choices=body.n or 1,
        priority=body.priority or 0,
        is_stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        requested_max_tokens=body.max_completion_tokens or body.max_tokens,
        ignored=tuple(ignored),
        metadata=body.metadata,
        user=body.user,
    )


def _chat_sampling(body: ChatCompletionRequest, info: ModelInfo) -> SamplingParams:
    # On the wire "no limit" means up to the end of the context, as OpenAI has it.
    requested = body.max_completion_tokens or body.max_tokens or info.max_context_tokens
    return SamplingParams(
        max_tokens=min(requested, info.max_context_tokens),
        # Greedy unless asked otherwise: Qwen2.5-VL's own generation config has temperature 1e-6.
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=body.seed,
        stop=tuple(body.stop or ()),
        ignore_eos=bool(body.ignore_eos),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=body.stop_token_ids or (),
        response_format=_to_format(body.response_format),
    )


def _to_format(asked: protocol.ResponseFormat | None) -> ResponseFormat | None:
    if asked is None or asked.type == "text":
        return None
    schema = asked.json_schema.schema_ if asked.json_schema is not None else None
    if schema is None:
        return ResponseFormat()
    try:
        return ResponseFormat(json.dumps(schema, allow_nan=False))
    except ValueError:
        raise InvalidSchemaError(
            "the JSON schema holds a number that is not finite", value="NaN or an infinity", allowed="finite numbers",
            fix="Put a finite number there, or leave that keyword out", param="response_format",
        ) from None  # fmt: skip


def to_requests(plan: ChatPlan, messages: tuple[ChatMessage, ...], completion_id: str) -> tuple[GenerationRequest, ...]:
    """One request for each choice: `{id}`, or `{id}-{i}` where there are several; choice i has the seed `seed + i`."""
    request = GenerationRequest(completion_id, messages, plan.sampling, plan.arm, priority=plan.priority)
    if plan.num_choices == 1:
        return (request,)
    return tuple(
        replace(request, request_id=f"{completion_id}-{i}", sampling=_nth_sampling(plan.sampling, i))
        for i in range(plan.num_choices)
    )


def _nth_sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    if sampling.seed is None:
        return sampling
    # Past the largest seed it goes on at the smallest one.
    return replace(sampling, seed=(sampling.seed + index + 2**63) % 2**64 - 2**63)


def compare_sampling(body: CompareRequest | None, info: ModelInfo) -> SamplingParams:
    """None: an upload's form has no sampling parameters."""
    if body is None:
        return SamplingParams(max_tokens=min(DEFAULT_COMPARE_TOKENS, info.max_context_tokens))
    return SamplingParams(
        max_tokens=min(body.max_tokens, info.max_context_tokens),
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
    )


# From here on: model_core -> wire.


def fold_answer(events: Sequence[TokenEvent]) -> TokenEvent:
    """One choice's events as one. Raises the error that ended it, RequestFailedError if nothing did."""
    logprobs = tuple(logprob for event in events for logprob in event.logprobs or ())
    return replace(collect_answer(events), logprobs=logprobs)


def total_usage(usages: Sequence[Usage | None]) -> Usage:
    """Of several choices: the first one's prompt, and what all have generated."""
    known = [usage for usage in usages if usage is not None]
    if not known:
        return Usage(0, 0)
    return replace(known[0], completion_tokens=sum(usage.completion_tokens for usage in known))


def to_usage(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=usage.cached_tokens, multimodal_tokens=usage.image_tokens
        ),
    )


def to_logprobs(logprobs: Sequence[TokenLogprob], token_text: TokenText) -> dict[str, Any]:
    """OpenAI's `logprobs` of a choice or a chunk."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(token_id)
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": data}

    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in logprobs
    ]
    return {"content": content, "refusal": None}


def to_finish_reason(reason: FinishReason | None) -> Literal["stop", "length"]:
    if reason == "stop" or reason == "length":
        return reason
    raise RequestFailedError("the engine gave the request up", value=reason)


def to_completion(
    plan: ChatPlan,
    answers: Sequence[TokenEvent],
    info: ModelInfo,
    token_text: TokenText,
    *,
    completion_id: str,
    created: int,
) -> ChatCompletion:
    """OpenAI's `chat.completion` object, one choice an answer; `fusion` is the prompt's, so any answer has it."""
    return ChatCompletion(
        id=completion_id,
        created=created,
        model=plan.model,
        choices=[_to_choice(index, answer, plan, token_text) for index, answer in enumerate(answers)],
        usage=to_usage(total_usage([answer.usage for answer in answers])),
        system_fingerprint=info.fingerprint,
        fusion=fusion_entries(answers[0].fusion or (), info.encoders),
        metadata=dict(plan.metadata) if plan.metadata is not None else None,
    )


def _to_choice(index: int, answer: TokenEvent, plan: ChatPlan, token_text: TokenText) -> Choice:
    return Choice(
        index=index,
        message=AssistantMessage(content=answer.text),
        logprobs=None if plan.sampling.logprobs is None else to_logprobs(answer.logprobs or (), token_text),
        finish_reason=to_finish_reason(answer.finish_reason),
    )


def clamped_max_tokens(plan: ChatPlan, info: ModelInfo, usage: Usage | None) -> int | None:
    """The tokens that are left for the answer if the client asked for more, else None."""
    left = max(info.max_context_tokens - (usage.prompt_tokens if usage else 0), 1)
    asked = plan.requested_max_tokens
    return left if asked is not None and asked > left else None


def model_cards(info: ModelInfo, **more: Any) -> list[ModelCard]:
    """The model itself first, then one virtual id for each arm. `more`: other fields of the card."""
    return [
        ModelCard(
            id=info.model_id if arm == "fused" else f"{info.model_id}@{arm}",
            created=info.created_unix,
            max_model_len=info.max_context_tokens,
            num_parameters=info.num_parameters,
            fusion=ModelFusion(
                arm=arm, strategy=info.fusion, trained=info.fusion_trained, encoders=list(info.encoders)
            ),
            **{"system_fingerprint": info.fingerprint, **more},
        )
        for arm in ARMS
    ]


def server_timing(timings: Timings | None) -> str:
    """The Server-Timing header's value, in milliseconds."""
    if timings is None:
        return ""
    return ", ".join(f"{stage};dur={getattr(timings, f'{stage}_seconds') * 1000:.1f}" for stage in STAGES)
