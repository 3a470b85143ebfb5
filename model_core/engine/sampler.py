"""From logits to a token. One generator a request, so that a seed means the same alone and in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from model_core.types import SamplingParams

#: Colder is greedy: dividing float32 logits by less overflows.
LEAST_TEMPERATURE = 1e-5


def build_generator(params: SamplingParams) -> torch.Generator | None:
    """None for greedy. Without a seed the draw is the operating system's."""
    if params.temperature < LEAST_TEMPERATURE:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed % 2**63)
    return generator


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """One token id from (V,) float32 logits: temperature, then min-p and top-k, then top-p (vLLM's order)."""
    if generator is None:
        return int(logits.argmax())
    logits = logits.cpu() / params.temperature
    if 0 < params.top_k < logits.numel():
        floor = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    probs = logits.softmax(-1)
    if params.min_p > 0.0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    if params.top_p < 1.0:
        ordered, index = probs.sort(descending=True)
        keep = ordered.cumsum(-1) - ordered < params.top_p * ordered.sum()  # the first is always kept
        probs = torch.zeros_like(probs).index_put((index[keep],), ordered[keep])
    return int(torch.multinomial(probs, 1, generator=generator))
