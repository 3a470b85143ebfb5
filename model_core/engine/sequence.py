"""One request on its way through the engine: what it asked for, what it holds, what it has produced."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model_core.engine.detokenizer import Detokenizer
from model_core.processing.batch import ModelInputs
from model_core.types import FusionWeights, GenerationRequest, Timings, Usage


@dataclass(slots=True)
class Sequence:
    """`row` is the cache row while it runs. Times are readings of the engine's clock."""

    request: GenerationRequest
    inputs: ModelInputs
    max_tokens: int
    detokenizer: Detokenizer
    generator: torch.Generator | None
    preprocess_seconds: float = 0.0
    added_at: float = 0.0
    admitted_at: float = 0.0
    prefilled_at: float = 0.0
    row: int | None = None
    token_ids: list[int] = field(default_factory=list)
    fusion: tuple[FusionWeights, ...] | None = None
    embeds: Tensor | None = None
    encode_seconds: float = 0.0
    encoder_seconds: dict[str, float] = field(default_factory=dict)
    prefill_seconds: float = 0.0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def next_position(self) -> int:
        """Rotary position of the last generated token, the next to be fed."""
        return len(self.inputs.input_ids) + len(self.token_ids) - 1 + self.inputs.delta

    def usage(self) -> Usage:
        scored = len(self.request.score_token_ids or ())
        prompt = len(self.inputs.input_ids) - scored
        return Usage(prompt, len(self.token_ids), self.inputs.num_image_tokens)

    def timings(self, now: float) -> Timings:
        decode = now - self.prefilled_at if self.prefilled_at else 0.0
        return Timings(
            queue_seconds=max(0.0, self.admitted_at - self.added_at) if self.admitted_at else now - self.added_at,
            preprocess_seconds=self.preprocess_seconds,
            encode_seconds=self.encode_seconds,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=decode,
            encoder_seconds=self.encoder_seconds,
        )
