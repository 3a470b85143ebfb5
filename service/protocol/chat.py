"""`POST /v1/chat/completions`: the request, the completion and the chunk, in OpenAI's shapes.

Every known parameter either works, or is neutral (its value asks for nothing), or is refused by name in
`check_supported`. It refuses to resolve images, models or arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, StringConstraints, Tag

from service.errors import InvalidBodyError, UnsupportedParameterError
from service.protocol.body import STRICT, TOLERANT

MAX_MESSAGES = 512
MAX_PARTS = 1024

#: Parameters that need code which is not there yet, each with the values that ask for nothing.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "stop_token_ids": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "priority": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

Stop = Annotated[
    # A list: past a before-validator strict mode judges as Python, where a JSON array is no tuple.
    list[Annotated[str, StringConstraints(min_length=1, max_length=1024)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=4),
]


class TextContent(BaseModel):
    model_config = TOLERANT
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = TOLERANT
    url: str
    detail: Literal["low", "high", "auto"] | None = None


class ImageUrlContent(BaseModel):
    model_config = TOLERANT
    type: Literal["image_url"]
    image_url: ImageUrl


class InputImageContent(BaseModel):
    """The Responses API's spelling of the same part."""

    model_config = TOLERANT
    type: Literal["input_image"]
    image_url: str
    detail: Literal["low", "high", "auto"] | None = None


class OtherContent(BaseModel):
    """Any other part: its type alone is read, to be refused by name."""

    model_config = TOLERANT
    type: Literal["text", "image_url", "input_image"]


def _content_tag(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url", "input_image") else "<other>"


ContentPart = Annotated[
    Annotated[TextContent, Tag("<text>")]
    | Annotated[ImageUrlContent, Tag("<image_url>")]
    | Annotated[InputImageContent, Tag("<input_image>")]
    | Annotated[OtherContent, Tag("<other>")],
    Discriminator(_content_tag),
]
Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[tuple[ContentPart, ...], Field(min_length=1, max_length=MAX_PARTS), Tag("<parts>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<parts>"),
]


class Message(BaseModel):
    model_config = TOLERANT
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(BaseModel):
    model_config = TOLERANT
    include_usage: bool | None = None


class ResponseFormat(BaseModel):
    model_config = TOLERANT
    type: Literal["text", "json_object", "json_schema"]


class FusionOptions(BaseModel):
    """The vendor's own corner of the body. `arm`: the same as asking for the model `NAME@ARM`."""

    model_config = STRICT
    arm: Literal["fused", "qwen-only", "dinov2-only", "blind", "unfused"] | None = None


class ChatCompletionRequest(BaseModel):
    """OpenAI's body, strict; `check_supported` says which of its parameters this server refuses."""

    model_config = TOLERANT

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    fusion: FusionOptions | None = None


def check_supported(body: ChatCompletionRequest) -> list[str]:
    """Names of the tolerated fields that were ignored. Raises on what can't be ignored honestly."""
    ignored = []
    for name, value in (body.model_extra or {}).items():
        if name not in NEUTRAL_VALUES:
            ignored.append(name)
        elif value is not None and not any(_is_same(value, neutral) for neutral in NEUTRAL_VALUES[name]):
            raise UnsupportedParameterError(
                f"'{name}' is not supported by this server",
                allowed=", ".join(repr(v) for v in NEUTRAL_VALUES[name]) or "null",
                fix="Leave it out",
                param=name,
            )
        elif name in ("tools", "functions", "tool_choice", "function_call") and value is not None:
            ignored.append(name)
    _check_combinations(body)
    for index, message in enumerate(body.messages):
        ignored.extend(_check_message(index, message))
    return ignored


def _is_same(value: object, neutral: object) -> bool:
    # In Python True == 1 and 0 == False: a wrong type is not a neutral value. 0.0 is as good as 0.
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return value == neutral


def _check_combinations(body: ChatCompletionRequest) -> None:
    if body.response_format is not None and body.response_format.type != "text":
        raise UnsupportedParameterError(
            "'response_format' is not supported beyond plain text",
            value=body.response_format.type,
            allowed='{"type": "text"}',
            param="response_format",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidBodyError(
            "'stream_options' needs a stream", value="stream: false", allowed="stream: true", param="stream_options"
        )
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidBodyError(
            "'max_tokens' and 'max_completion_tokens' contradict each other",
            value=f"{body.max_tokens} and {body.max_completion_tokens}",
            allowed="one of them, or the same number",
            param="max_tokens",
        )


def _check_message(index: int, message: Message) -> list[str]:
    ignored = []
    for name, value in (message.model_extra or {}).items():
        if name in ("tool_calls", "function_call", "audio") and value not in (None, []):
            raise UnsupportedParameterError(
                f"'{name}' in a message is not supported by this server", param=f"messages[{index}].{name}"
            )
        if value is not None:
            ignored.append(f"messages[{index}].{name}")
    return ignored


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0
    multimodal_tokens: int = 0


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """`fusion`: one entry an image, `{qwen_weight, dinov2_weight, dominant_encoder, warnings}`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage
    system_fingerprint: str
    fusion: list[dict[str, Any]]
    metadata: dict[str, str] | None = None
