"""The body of `POST /v1/chat/completions`, in OpenAI's shape with vLLM's further sampling parameters.

Every known parameter either works, or is neutral (its value asks for nothing), or is refused by name in
`check_supported`. It refuses to resolve images, models or arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints

from model_core.types import MAX_LOGPROBS
from service.errors import InvalidBodyError, UnsupportedParameterError
from service.protocol.body import STRICT, TOLERANT
from service.protocol.content import Message, content_extras, extra_names

MAX_MESSAGES = 512
MAX_CHOICES = 8
_MAX_BIASES = 1024

#: What this server does not do, each with the values that ask for nothing.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
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


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
#: As text, since JSON has no other keys; in one spelling, so that no token is named twice.
TokenIdText = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    model_config = TOLERANT
    include_usage: bool | None = None


class JsonSchema(BaseModel):
    """`strict` false asks for less than is given: the answer always keeps to the schema.

    name, description: for the client's own use; no model is told. schema: null is any object.
    """

    model_config = TOLERANT
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = TOLERANT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class FusionOptions(BaseModel):
    """The vendor's own corner of the body. `arm`: the same as asking for the model `NAME@ARM`."""

    model_config = STRICT
    arm: Literal["fused", "qwen-only", "dinov2-only", "blind", "unfused"] | None = None


class ChatCompletionRequest(BaseModel):
    """OpenAI's body, strict; `check_supported` says which of its parameters this server refuses.

    n: choice i is sampled with `seed + i` where a seed is given. priority: lower goes first. logit_bias: token ids as
    strings. logprobs: of the raw distribution, before temperature and penalties; one entry a generated token, the
    end-of-text token included, so that there are `completion_tokens` of them. response_format: past `max_tokens` the
    JSON is cut, and `finish_reason` is "length".
    """

    model_config = TOLERANT

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: (
        Annotated[dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=_MAX_BIASES)] | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
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
    """Names of the tolerated fields that were ignored, wherever they stand. Raises on what can't be ignored honestly.

    A null asks for nothing, so it is neither refused nor named.
    """
    ignored = []
    for name, value in (body.model_extra or {}).items():
        if value is None:
            continue
        if name not in NEUTRAL_VALUES:
            ignored.append(name)
        elif not any(_is_same(value, neutral) for neutral in NEUTRAL_VALUES[name]):
            raise UnsupportedParameterError(
                f"'{name}' is not supported by this server",
                allowed=", ".join(repr(v) for v in NEUTRAL_VALUES[name]) or "null",
                fix="Leave it out",
                param=name,
            )
        elif name in ("tools", "functions", "tool_choice", "function_call"):
            ignored.append(name)
    _check_combinations(body)
    ignored.extend(extra_names("stream_options", body.stream_options))
    ignored.extend(extra_names("response_format", body.response_format))
    if body.response_format is not None:
        ignored.extend(extra_names("response_format.json_schema", body.response_format.json_schema))
    for index, message in enumerate(body.messages):
        ignored.extend(_check_message(f"messages[{index}]", message))
    return ignored


def _is_same(value: object, neutral: object) -> bool:
    # In Python True == 1 and 0 == False: a wrong type is not a neutral value. 0.0 is as good as 0.
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return value == neutral


def _check_combinations(body: ChatCompletionRequest) -> None:
    form = body.response_format
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        raise InvalidBodyError(
            "'response_format.json_schema' and the type 'json_schema' belong together",
            value=form.type,
            allowed='{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}',
            fix="Give both, or for any object the type json_object alone",
            param="response_format",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidBodyError(
            "'stream_options' needs a stream", value="stream: false", allowed="stream: true",
            fix="Set 'stream' to true, or leave 'stream_options' out", param="stream_options",
        )  # fmt: skip
    if body.top_logprobs and not body.logprobs:
        raise InvalidBodyError(
            "'top_logprobs' needs 'logprobs'", value="logprobs: false", allowed="logprobs: true",
            fix="Set 'logprobs' to true, or leave 'top_logprobs' out", param="top_logprobs",
        )  # fmt: skip
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidBodyError(
            "'max_tokens' and 'max_completion_tokens' contradict each other",
            value=f"{body.max_tokens} and {body.max_completion_tokens}",
            allowed="one of them, or the same number",
            fix="Leave one of the two out",
            param="max_tokens",
        )


def _check_message(where: str, message: Message) -> list[str]:
    for name in ("tool_calls", "function_call", "audio"):
        found = (message.model_extra or {}).get(name)
        if found not in (None, []):
            raise UnsupportedParameterError(
                f"'{name}' in a message is not supported by this server", value=type(found).__name__,
                allowed="null or []", fix="Leave it out", param=f"{where}.{name}",
            )  # fmt: skip
    return [*extra_names(where, message), *content_extras(where, message.content)]
