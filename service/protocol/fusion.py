"""Bodies of the fusion endpoints, and what each number in their answers means.

Unlike the OpenAI bodies these are ours: an unknown key is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, Field

from service.protocol.body import STRICT
from service.protocol.chat import MAX_MESSAGES
from service.protocol.content import Message

ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Messages = Annotated[tuple[Message, ...], Field(min_length=1, max_length=MAX_MESSAGES)]


#: Tokens of each arm's answer.
DEFAULT_COMPARE_TOKENS = 128


class AnalyzeRequest(BaseModel):
    model_config = STRICT
    model: ModelName | None = None
    messages: Messages


class CompareRequest(BaseModel):
    """Sampling is greedy unless asked otherwise, so that arms differ by what they see alone."""

    model_config = STRICT
    model: ModelName | None = None
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = DEFAULT_COMPARE_TOKENS
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


ANALYZE_MEANING: Mapping[str, str] = {
    "qwen_weight, dinov2_weight": "The gate's routing weights; they sum to 1 for each image and are null where the "
    "strategy has no gate. Routing is not importance: POST /v1/encoders/compare measures reliance.",
    "dominant_encoder": "The encoder with the larger weight, or tie.",
    "entropy": "Entropy of the weights divided by log(number of encoders): 0 is one encoder alone, 1 is an even split.",
    "contribution": "Each encoder's share of the fused tokens, c_e = max(0, |y|_1 - |y - u_e|_1), normalised.",
    "relative_update": "|y - q| / |q|: how far fusion moved Qwen's own tokens; 0 on a fresh model.",
    "fusion_trained": "False while fusion is at its birth, where the weights say nothing about the picture.",
}

COMPARE_MEANING: Mapping[str, str] = {
    "answers": "What each arm answers: fused sees with both encoders; qwen-only, dinov2-only and blind have the "
    "missing encoders' features replaced by their mean; unfused feeds Qwen's own tokens past fusion.",
    "log_likelihood": "log p, in nats, of the fused answer's tokens when that answer is forced on this arm.",
    "reliance": "delta_e = log p(answer | both) - log p(answer | without e), in nats: the causal measure.",
    "shapley": "phi_q = ((v(q) - v(none)) + (v(both) - v(d))) / 2, and the same for d, with "
    "v = log p(answer | seeing); they add up to v(both) - v(none).",
    "interaction": "v(both) - v(q) - v(d) + v(none). Below 0 either would have done; above 0 they need each other.",
    "seconds": "Of this one request on a server that may serve others at the same time.",
}
