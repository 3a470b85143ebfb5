"""The only file that knows both vocabularies: the wire's and `model_core.types`.

In: validated bodies and the loaded model's `ModelInfo`. Out: ChatMessages, SamplingParams and arms; and
back from Answers, TokenEvents and FusionWeights to JSON objects. It refuses to run anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model_core.analysis.compare import ArmResult, Comparison
from model_core.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, RequestFailedError
from model_core.types import (
    ARMS,
    Arm,
    ChatMessage,
    FinishReason,
    FusionWeights,
    ImagePart,
    ModelInfo,
    Part,
    SamplingParams,
    TextPart,
    Timings,
    TokenEvent,
    Usage,
)
from service.protocol.chat import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionRequest,
    Choice,
    CompletionUsage,
    ImageUrlContent,
    InputImageContent,
    Message,
    PromptTokensDetails,
    TextContent,
    check_supported,
)
from service.protocol.fusion import CompareRequest
from service.protocol.models import ModelCard, ModelFusion

#: What turns an image's URL and its place in the body into bytes; media.py has the real one.
ReadImage = Callable[[str, str], bytes]

#: `detail: low` allows 256 vision tokens an image (28 x 28 pixels each); high and auto the model's own budget.
_LOW_DETAIL_PIXELS = 256 * 28 * 28

#: No vocabulary packs more characters into a token; text beyond is refused before it is tokenised.
_MAX_CHARACTERS_PER_TOKEN = 256


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """What a chat body asks for, without its messages. `model` is the id as the client spelt it."""

    model: str
    arm: Arm
    sampling: SamplingParams
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
        "there is no such model", value=name, allowed=", ".join(card.id for card in model_cards(info)), param="model"
    )


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
            param="fusion.arm",
        )
    # On the wire "no limit" means up to the end of the context, as OpenAI has it.
    requested = body.max_completion_tokens or body.max_tokens
    sampling = SamplingParams(
        max_tokens=min(requested or info.max_context_tokens, info.max_context_tokens),
        # Greedy unless asked otherwise: Qwen2.5-VL's own generation config has temperature 1e-6.
        temperature=0.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=body.seed,
        stop=tuple(body.stop or ()),
        ignore_eos=bool(body.ignore_eos),
    )
    return ChatPlan(
        model=model,
        arm=asked or arm,
        sampling=sampling,
        is_stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        requested_max_tokens=requested,
        ignored=tuple(ignored),
        metadata=body.metadata,
        user=body.user,
    )


def compare_sampling(body: CompareRequest, info: ModelInfo) -> SamplingParams:
    return SamplingParams(
        max_tokens=min(body.max_tokens, info.max_context_tokens),
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
    )


def count_images(messages: Iterable[Message]) -> int:
    return sum(
        isinstance(part, (ImageUrlContent, InputImageContent))
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
    )


def require_images(messages: Sequence[Message]) -> None:
    if count_images(messages) == 0:
        raise InvalidRequestError(
            "there is nothing to analyze: the messages hold no image",
            value=f"{len(messages)} message(s), 0 images",
            allowed="messages with at least one image",
            param="messages",
        )


def to_messages(messages: Sequence[Message], read_image: ReadImage, info: ModelInfo) -> tuple[ChatMessage, ...]:
    """Decodes base64, so it belongs in the preprocess pool. Raises ImageError, ContextLengthError."""
    _check_text_length(messages, info)
    return tuple(_to_message(f"messages[{index}]", message, read_image) for index, message in enumerate(messages))


def _check_text_length(messages: Sequence[Message], info: ModelInfo) -> None:
    count = 0
    for message in messages:
        parts = (message.content,) if isinstance(message.content, str) else message.content
        count += sum(len(p) if isinstance(p, str) else len(p.text) for p in parts if isinstance(p, (str, TextContent)))
    if count > info.max_context_tokens * _MAX_CHARACTERS_PER_TOKEN:
        raise ContextLengthError(
            "the prompt does not fit the context",
            value=f"{count} characters",
            allowed=f"{info.max_context_tokens} tokens",
            param="messages",
        )


def _to_message(where: str, message: Message, read_image: ReadImage) -> ChatMessage:
    role: Literal["system", "user", "assistant"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return ChatMessage(role, (TextPart(message.content),))
    return ChatMessage(
        role, tuple(_to_part(f"{where}.content[{i}]", part, read_image) for i, part in enumerate(message.content))
    )


def _to_part(where: str, part: object, read_image: ReadImage) -> Part:
    if isinstance(part, TextContent):
        return TextPart(part.text)
    if isinstance(part, ImageUrlContent):
        return _to_image(part.image_url.url, part.image_url.detail, read_image, f"{where}.image_url.url")
    if isinstance(part, InputImageContent):
        return _to_image(part.image_url, part.detail, read_image, f"{where}.image_url")
    raise InvalidRequestError("unknown content part", allowed="text, image_url, input_image", param=where)


def _to_image(url: str, detail: str | None, read_image: ReadImage, param: str) -> ImagePart:
    return ImagePart(read_image(url, param), _LOW_DETAIL_PIXELS if detail == "low" else None)


def upload_messages(data: bytes, question: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", (ImagePart(data), TextPart(question))),)


# From here on: model_core -> wire.


def fusion_entry(weights: FusionWeights, encoders: Sequence[str]) -> dict[str, Any]:
    """`{qwen_weight, dinov2_weight, dominant_encoder, warnings}`; weights null where there is no gate."""
    values = weights.weights
    entry: dict[str, Any] = {f"{name}_weight": None if values is None else values.get(name) for name in encoders}
    dominant = weights.dominant_encoder
    entry["dominant_encoder"] = dominant if dominant is not None or values is None else "tie"
    entry["warnings"] = list(weights.warnings)
    return entry


def fusion_entries(fusion: Iterable[FusionWeights], encoders: Sequence[str]) -> list[dict[str, Any]]:
    return [fusion_entry(weights, encoders) for weights in fusion]


def analysis_entry(index: int, weights: FusionWeights, encoders: Sequence[str]) -> dict[str, Any]:
    return {
        "index": index,
        **fusion_entry(weights, encoders),
        "entropy": weights.entropy,
        "contribution": None if weights.contribution is None else dict(weights.contribution),
        "relative_update": weights.relative_update,
        "fusion_trained": weights.fusion_trained,
    }


def mean_weights(fusion: Sequence[FusionWeights], encoders: Sequence[str]) -> dict[str, Any]:
    """The mean over images, and the encoder that dominates it."""
    gated = [weights.weights for weights in fusion if weights.weights is not None]
    if not gated:
        return {**{f"{name}_weight": None for name in encoders}, "dominant_encoder": None}
    means = {name: sum(weights.get(name, 0.0) for weights in gated) / len(gated) for name in encoders}
    first, second = sorted(means.values(), reverse=True)[:2] if len(means) > 1 else (1.0, 0.0)
    dominant = "tie" if first - second < 1e-6 else max(means, key=lambda name: means[name])
    return {**{f"{name}_weight": mean for name, mean in means.items()}, "dominant_encoder": dominant}


def to_usage(usage: Usage | None) -> CompletionUsage:
    known = usage or Usage(0, 0)
    return CompletionUsage(
        prompt_tokens=known.prompt_tokens,
        completion_tokens=known.completion_tokens,
        total_tokens=known.prompt_tokens + known.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(multimodal_tokens=known.image_tokens),
    )


def to_finish_reason(reason: FinishReason | None) -> Literal["stop", "length"]:
    if reason == "stop" or reason == "length":
        return reason
    raise RequestFailedError("the engine gave the request up", value=reason)


def to_completion(
    plan: ChatPlan, answer: TokenEvent, info: ModelInfo, *, completion_id: str, created: int
) -> ChatCompletion:
    """A whole answer as OpenAI's `chat.completion` object, with `fusion` beside the choices."""
    return ChatCompletion(
        id=completion_id,
        created=created,
        model=plan.model,
        choices=[
            Choice(message=AssistantMessage(content=answer.text), finish_reason=to_finish_reason(answer.finish_reason))
        ],
        usage=to_usage(answer.usage),
        system_fingerprint=info.fingerprint,
        fusion=fusion_entries(answer.fusion or (), info.encoders),
        metadata=dict(plan.metadata) if plan.metadata is not None else None,
    )


def clamped_max_tokens(plan: ChatPlan, info: ModelInfo, usage: Usage | None) -> int | None:
    """The tokens that are left for the answer if the client asked for more, else None."""
    left = max(info.max_context_tokens - (usage.prompt_tokens if usage else 0), 1)
    asked = plan.requested_max_tokens
    return left if asked is not None and asked > left else None


def model_cards(info: ModelInfo) -> list[ModelCard]:
    """The model itself first, then one virtual id for each arm."""
    return [
        ModelCard(
            id=info.model_id if arm == "fused" else f"{info.model_id}@{arm}",
            created=info.created_unix,
            max_model_len=info.max_context_tokens,
            num_parameters=info.num_parameters,
            fusion=ModelFusion(
                arm=arm, strategy=info.fusion, trained=info.fusion_trained, encoders=list(info.encoders)
            ),
        )
        for arm in ARMS
    ]


def server_timing(timings: Timings | None) -> str:
    """The Server-Timing header's value, in milliseconds."""
    if timings is None:
        return ""
    stages = ("queue", "preprocess", "encode", "prefill", "decode")
    return ", ".join(f"{stage};dur={getattr(timings, f'{stage}_seconds') * 1000:.1f}" for stage in stages)


def to_comparison(comparison: Comparison, encoders: Sequence[str]) -> dict[str, Any]:
    """A Comparison as JSON: each arm's answer and likelihood, then the sums."""
    by_token = comparison.reliance_by_token
    reliance = comparison.reliance
    return {
        "fusion": [analysis_entry(i, weights, encoders) for i, weights in enumerate(comparison.fusion)],
        "answers": {arm: _arm_entry(result) for arm, result in comparison.arms.items()},
        "reliance": None
        if reliance is None or by_token is None
        else {name: {"sum": reliance[name], "tokens": list(by_token[name])} for name in reliance},
        "shapley": None if comparison.shapley is None else dict(comparison.shapley),
        "interaction": comparison.interaction,
        "encoder_seconds": dict(comparison.encoder_seconds),
    }


def _arm_entry(result: ArmResult) -> dict[str, Any]:
    answer = result.answer
    return {
        "content": answer.text,
        "finish_reason": answer.finish_reason,
        "completion_tokens": to_usage(answer.usage).completion_tokens,
        "same_as_fused": result.first_divergence is None,
        "first_divergence": result.first_divergence,
        "log_likelihood": None
        if result.log_likelihood is None
        else {
            "sum": result.log_likelihood,
            "mean": result.log_likelihood_per_token,
            "tokens": list(result.token_log_likelihoods),
        },
        "seconds": _seconds(answer.timings),
    }


def _seconds(timings: Timings | None) -> dict[str, Any] | None:
    if timings is None:
        return None
    stages = {
        stage: getattr(timings, f"{stage}_seconds") for stage in ("queue", "preprocess", "encode", "prefill", "decode")
    }
    return {**stages, "total": sum(stages.values()), "encoders": dict(timings.encoder_seconds)}
