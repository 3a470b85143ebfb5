"""What `POST /v1/chat/completions` answers, in OpenAI's shapes: the completion, its choices, its usage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: came from the prefix cache; `multimodal_tokens`: stand for images."""

    cached_tokens: int = 0
    multimodal_tokens: int = 0


class CompletionUsage(BaseModel):
    """Of all choices together; the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """`logprobs`: `{content: [{token, logprob, bytes, top_logprobs: [{token, logprob, bytes}]}], refusal}`."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None = None
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
