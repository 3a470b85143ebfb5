"""One request on its way through the engine: what it asked for, what it holds, what it has produced."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from torch import Tensor

from model_core.engine.detokenizer import Detokenizer
from model_core.engine.encoder_pass import Held
from model_core.engine.prefix_hash import PrefixHasher
from model_core.engine.sampler import SamplerState
from model_core.processing.batch import ModelInputs
from model_core.types import FusionWeights, GenerationRequest, Timings, TokenLogprob, Usage


@dataclass(slots=True, eq=False)
class Sequence:
    """Times are readings of the engine's clock; the scheduler owns num_computed, num_cached, blocks, block_hashes.

    embeds: (N, D) fused tokens of all its images, kept until it ends: a preempted sequence needs them again.
    held_features: of those of its images that are encoded while others are not, until all are fused.
    image_places: where in the prompt they go. is_fork: its inputs were prepared for another, who tells what that took.
    """

    request: GenerationRequest
    inputs: ModelInputs
    max_tokens: int
    detokenizer: Detokenizer
    sampler: SamplerState
    hasher: PrefixHasher | None
    preprocess_seconds: float = 0.0
    is_fork: bool = False
    arrival: int = 0
    added_at: float = 0.0
    queued_at: float | None = None
    queue_seconds: float = 0.0
    prefilled_at: float = 0.0
    num_computed: int = 0
    num_cached: int = -1
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    fusion: tuple[FusionWeights, ...] | None = None
    embeds: Tensor | None = None
    held_features: Held = field(default_factory=dict)
    image_places: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    has_opened: bool = False
    encode_wait_seconds: float | None = None
    encode_seconds: float = 0.0
    encoder_seconds: dict[str, float] = field(default_factory=dict)
    prefill_seconds: float = 0.0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def num_prompt(self) -> int:
        return len(self.inputs.input_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.inputs.input_ids) + len(self.token_ids)

    @property
    def deadline(self) -> float | None:
        timeout = self.request.timeout_seconds
        return None if timeout is None else self.added_at + timeout

    def extend_hashes(self, block_size: int) -> None:
        """Name every full block. Of a scored sequence only those before the first score: they must be computed."""
        del block_size  # the hasher's own
        if self.hasher is None:
            return
        ids = self.inputs.input_ids
        scored = self.request.score_token_ids
        if scored is not None:
            ids = ids[: len(ids) - len(scored) - 1]
        elif self.token_ids:
            ids = ids + self.token_ids
        self.hasher.extend(self.block_hashes, ids, self.inputs.spans)

    def ids_between(self, start: int, end: int) -> list[int]:
        """Prompt and generated ids of the places [start, end)."""
        n = len(self.inputs.input_ids)
        ids = self.inputs.input_ids[start : min(end, n)]
        return ids if end <= n else ids + self.token_ids[max(0, start - n) : end - n]

    def images_between(self, start: int, end: int) -> tuple[int, int]:
        """Which rows of `embeds` stand in the places [start, end)."""
        return bisect_left(self.image_places, start), bisect_left(self.image_places, end)

    def leave_queue(self, now: float) -> None:
        """It waited until now; it waits twice, for the encoders and for a seat."""
        if self.queued_at is not None:
            self.queue_seconds += now - self.queued_at
            self.queued_at = None

    def leave_encode_queue(self, now: float) -> None:
        """The encoders take it, or its first images."""
        self.leave_queue(now)
        if self.encode_wait_seconds is None and self.inputs.pixels is not None:
            self.encode_wait_seconds = self.queue_seconds

    def usage(self) -> Usage:
        scored = len(self.request.score_token_ids or ())
        cached = max(0, min(self.num_cached, self.num_prompt - scored))
        pixels = self.inputs.media.image_pixels
        return Usage(self.num_prompt - scored, len(self.token_ids), self.inputs.num_image_tokens, cached, pixels)

    def timings(self, now: float) -> Timings:
        decode = now - self.prefilled_at if self.prefilled_at else 0.0
        waiting = now - self.queued_at if self.queued_at is not None else 0.0
        return Timings(
            queue_seconds=self.queue_seconds + waiting,
            preprocess_seconds=self.preprocess_seconds,
            encode_seconds=self.encode_seconds,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=decode,
            encoder_seconds=self.encoder_seconds,
            encode_wait_seconds=self.encode_wait_seconds,
            preprocess_stages={} if self.is_fork else self.inputs.media.stage_seconds,
        )
