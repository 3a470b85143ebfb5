"""The vocabulary that crosses the border between the model and everybody else. No torch here.

A `GenerationRequest` goes in; `TokenEvent`s come out, and every accepted request ends in exactly one
event that has a `finish_reason` or an `error`. The service knows these types and nothing behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from model_core.errors import DualVisionError, InvalidRequestError

Role = Literal["system", "user", "assistant"]
Detail = Literal["low", "auto", "high"]
Arm = Literal["fused", "qwen-only", "dinov2-only", "blind", "unfused"]
FinishReason = Literal["stop", "length", "abort"]

#: As OpenAI's API has it.
MAX_LOGPROBS = 20
ROLES: tuple[str, ...] = get_args(Role)
DETAILS: tuple[str, ...] = get_args(Detail)
MIN_FPS, MAX_FPS = 0.001, 1000.0
ARMS: tuple[Arm, ...] = get_args(Arm)
_ASK = "Send the question as a message of the user"

#: What each arm takes away before the gate (model.md section 4, "Arms"). `unfused` bypasses fusion.
ARM_REMOVES: Mapping[Arm, tuple[str, ...]] = {
    "fused": (),
    "qwen-only": ("dinov2",),
    "dinov2-only": ("qwen",),
    "blind": ("qwen", "dinov2"),
    "unfused": ("dinov2",),
}


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One still image: encoded bytes, or an opened `PIL.Image.Image` (typed loosely to stay light).

    `max_pixels` lowers the resize budget for this image alone. `detail`: "low" is a budget of at most a quarter of the
    checkpoint's and 256 vision tokens; "auto" and "high" are the checkpoint's own.
    """

    image: Any
    max_pixels: int | None = None
    detail: Detail = "auto"

    def __post_init__(self) -> None:
        _check("detail", self.detail, self.detail in DETAILS, ", ".join(DETAILS))
        is_count = self.max_pixels is None or (type(self.max_pixels) is int and self.max_pixels > 0)
        _check("max_pixels", self.max_pixels, is_count, "an integer above 0")


@dataclass(frozen=True, slots=True)
class VideoPart:
    """A list of frames, encoded or PIL, sampled at `fps` frames a second; `detail` as an image's, for each frame."""

    frames: tuple[Any, ...]
    fps: float = 2.0
    detail: Detail = "auto"

    def __post_init__(self) -> None:
        is_number = isinstance(self.fps, (int, float)) and not isinstance(self.fps, bool)
        # Positions in time are whole numbers made of it: beyond these they overflow or all become one.
        is_rate = is_number and MIN_FPS <= self.fps <= MAX_FPS
        _check("fps", self.fps, is_rate, f"a number from {MIN_FPS:g} to {MAX_FPS:g}")
        _check("detail", self.detail, self.detail in DETAILS, ", ".join(DETAILS))


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            fix, allowed = "Send what the user says as 'user'", ", ".join(ROLES)
            raise InvalidRequestError(
                "unknown message role", value=self.role, allowed=allowed, fix=fix, param="messages"
            )


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The answer is JSON. schema: as JSON text, its order of properties is the answer's; None is any object.

    What the schema may hold is the engine's business: `prepare` raises InvalidSchemaError.
    """

    schema: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `temperature == 0` is greedy; `seed` gives the request its own generator.

    presence_penalty, frequency_penalty: OpenAI's, over the tokens generated so far; repetition_penalty: over prompt
    and generated tokens, 1 is off. logit_bias: {token id: added to its logit}. logprobs: None is off, else how many of
    the most likely tokens to report beside the chosen one. min_tokens: no end of text before so many tokens, unless
    nothing else can follow. response_format: only tokens that keep the answer within it; None is plain text. It ends by
    itself, so `ignore_eos` contradicts it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    response_format: ResponseFormat | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "an integer of at least 1")
        _check("temperature", self.temperature, 0.0 <= self.temperature <= 2.0, "0 to 2")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 to 1")
        _check("seed", self.seed, self.seed is None or -(2**63) <= self.seed < 2**63, "a signed 64-bit integer")
        _check("stop", self.stop, len(self.stop) <= 4 and all(self.stop), "at most 4 strings, none empty")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2.0 <= getattr(self, name) <= 2.0, "-2 to 2")
        _check(
            "repetition_penalty", self.repetition_penalty, 0.0 < self.repetition_penalty <= 2.0, "above 0, at most 2"
        )
        is_bias = all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values())
        _check("logit_bias", dict(self.logit_bias), is_bias, "biases from -100 to 100")
        _check("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "0 to 20")
        _check("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens")
        _check("stop_token_ids", self.stop_token_ids, len(self.stop_token_ids) <= 64, "at most 64 token ids")
        is_ending = self.response_format is None or not self.ignore_eos
        _check("ignore_eos", self.ignore_eos, is_ending, "false with a response_format, which ends the answer itself")


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise InvalidRequestError(f"'{name}' is out of range", value=value, allowed=allowed, param=name,
                                  fix="Correct it, or leave it out")  # fmt: skip


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One unit of work for the engine.

    `score_token_ids`: teacher-forced scoring instead of generation. The ids are taken as the
    assistant's answer; the terminal event carries their log-likelihoods and no new token is made.
    `encode_only`: stop after the encoders and the gate; the one event carries `fusion` with each
    encoder's contribution.
    `priority`: lower goes first; requests of one priority go in the order of their arrival.
    `timeout_seconds`: from `add_request` on; past it the request ends with RequestFailedError, whatever its stage.
    `fetch_seconds`: what its images took to come, before `prepare`; its preprocess time begins with them.
    """

    request_id: str
    messages: tuple[ChatMessage, ...]
    sampling: SamplingParams = SamplingParams()
    arm: Arm = "fused"
    score_token_ids: tuple[int, ...] | None = None
    encode_only: bool = False
    priority: int = 0
    timeout_seconds: float | None = None
    fetch_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise InvalidRequestError("unknown arm", value=self.arm, allowed=", ".join(ARMS), param="model",
                                      fix="Name one of these, or leave it out for fused")  # fmt: skip
        if not self.messages:
            allowed = "at least one message"
            raise InvalidRequestError("there are no messages", value=[], allowed=allowed, fix=_ASK, param="messages")
        if self.score_token_ids is not None and not self.score_token_ids:
            raise InvalidRequestError("there is nothing to score", value=[], allowed="at least one token id",
                                      fix="Give the answer's ids, or None to generate")  # fmt: skip


@dataclass(frozen=True, slots=True)
class FusionWeights:
    """How one image (or one video) was routed and what each encoder contributed.

    weights: gate weights by encoder name, summing to 1; None where the strategy has no gate.
    entropy: of the weights, normalised to 0..1 by log(number of encoders).
    contribution: share of each encoder in the fused tokens (ALTI-style, model.md section 6), or None.
    relative_update: |y - q| / |q|, how far fusion moved Qwen's own tokens.
    A weight is a routing weight, not a measure of importance: reliance is what `compare` reports.
    """

    weights: Mapping[str, float] | None
    dominant_encoder: str | None
    fusion_trained: bool
    entropy: float | None = None
    contribution: Mapping[str, float] | None = None
    relative_update: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """cached_tokens: prompt tokens whose keys and values came from the prefix cache.

    image_pixels: width x height of each picture and frame as it came.
    """

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    image_pixels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Of one generated token under the distribution before temperature, penalties and filters, as vLLM reports it.

    top: the most likely (token id, logprob) pairs, best first, as many as asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in each stage of one request, measured with the clock that the engine was given."""

    queue_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    encoder_seconds: Mapping[str, float] = field(default_factory=dict)
    #: Parts of preprocess_seconds: decode, resize, patchify.
    preprocess_stages: Mapping[str, float] = field(default_factory=dict)
    #: Of queue_seconds, until the encoders took the first of its images; None without images.
    encode_wait_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one engine step produced for one request.

    The first event of a request carries `fusion` (one entry an image, in order) and `usage` with the
    prompt's counts. `text` is complete UTF-8: a character split over tokens is held back. The last
    event has `finish_reason` or `error`, `usage` and `timings`; after it the request id is unknown.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    fusion: tuple[FusionWeights, ...] | None = None
    finish_reason: FinishReason | None = None
    error: DualVisionError | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    score_logprobs: tuple[float, ...] | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def is_terminal(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and for the liveness check. Counters only ever grow.

    encoder_batches: by encoder, how many forwards had so many images. encoder_tokens: image tokens of all forwards.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_images_encoded: int = 0
    encoder_seconds: Mapping[str, float] = field(default_factory=dict)
    num_encoding: int = 0
    num_preemptions: int = 0
    kv_cache_usage_ratio: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    encoder_cache_hits: Mapping[str, int] = field(default_factory=dict)
    encoder_cache_misses: Mapping[str, int] = field(default_factory=dict)
    encoder_cache_evictions: Mapping[str, int] = field(default_factory=dict)
    encoder_cache_bytes: Mapping[str, int] = field(default_factory=dict)
    encoder_batches: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    encoder_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a server says about the loaded model. `fingerprint` changes with weights or preprocessing."""

    model_id: str
    fingerprint: str
    fusion: str
    fusion_trained: bool
    encoders: tuple[str, ...]
    max_context_tokens: int
    device: str
    dtype: str
    num_parameters: int
    created_unix: int = 0


class Engine(Protocol):
    """Synchronous and deterministic; nothing in it sleeps, locks, or reads a wall clock.

    `prepare` is pure and may run in any thread. Everything else belongs to one thread.
    """

    info: ModelInfo

    def prepare(self, request: GenerationRequest) -> Any:
        """Decode images, build ids, check the context. Raises InputError; touches no engine state."""

    def fork(self, prepared: Any, request: GenerationRequest) -> Any:
        """Another request with the same messages and arm: shares the decoded images and ids. Pure, in any thread."""

    def add_request(self, prepared: Any) -> None:
        """Queue what `prepare` returned."""

    def abort(self, request_id: str) -> None:
        """Forget a request at any stage and free what it holds. Unknown ids are ignored. No event follows."""

    def step(self) -> list[TokenEvent]:
        """Do one bounded piece of work for the whole batch. An error inside one row ends that row alone."""

    def reset_caches(self) -> None:
        """Forget kept prefixes and features: the weights have changed, or every round shall cost the same."""

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        """A token as text and as bytes, for log-probabilities on the wire. May run in any thread."""

    def has_work(self) -> bool:
        """True while anything waits or runs."""

    def stats(self) -> EngineStats: ...


def messages_from_dicts(messages: Sequence[Mapping[str, Any]]) -> tuple[ChatMessage, ...]:
    """Qwen's and OpenAI's message dictionaries, already resolved to bytes or PIL images, as ChatMessages.

    Content is a string or a list of parts: {"type": "text", "text"}, {"type": "image", "image"},
    {"type": "video", "video": [frames], "fps"}. Anything else is an InvalidRequestError.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequestError("messages must be a list", value=messages, allowed="a list of at least one message",
                                  fix=_ASK, param="messages")  # fmt: skip
    return tuple(_message(i, m) for i, m in enumerate(messages))


def _message(index: int, message: Mapping[str, Any]) -> ChatMessage:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or "role" not in message:
        raise InvalidRequestError(f"{where} has no role", value=message, allowed=", ".join(ROLES), param="messages",
                                  fix='Write it as {"role": "user", "content": ...}')  # fmt: skip
    content = message.get("content")
    if isinstance(content, str):
        return ChatMessage(message["role"], (TextPart(content),))
    if not isinstance(content, Sequence) or not content:
        raise InvalidRequestError(
            f"{where} has no content", value=content, allowed="a string, or a list of at least one part",
            fix="Add a text or a picture, or leave the message out", param="messages",
        )  # fmt: skip
    return ChatMessage(message["role"], tuple(_part(f"{where}.content[{i}]", p) for i, p in enumerate(content)))


def _part(where: str, part: Mapping[str, Any]) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return TextPart(part["text"])
    if kind == "image" and part.get("image") is not None:
        return ImagePart(part["image"], part.get("max_pixels"), part.get("detail", "auto"))
    if kind == "video" and isinstance(part.get("video"), (list, tuple)) and part["video"]:
        return VideoPart(tuple(part["video"]), part.get("fps", 2.0), part.get("detail", "auto"))
    raise InvalidRequestError(
        f"{where} is not a part that can be read",
        value=part,
        allowed='parts {"type": "text", "text"}, {"type": "image", "image"}, {"type": "video", "video": [frames]}',
        fix="Name its type, and give what that type holds", param="messages",
    )  # fmt: skip
