"""A small, real `Engine` without a model: deterministic words, and switches that tests throw. No sleeps."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

from model_core.errors import ContextLengthError, ImageParseError, OutOfDeviceMemoryError, RequestFailedError
from model_core.types import (
    Arm,
    EngineStats,
    FinishReason,
    FusionWeights,
    GenerationRequest,
    ImagePart,
    ModelInfo,
    TextPart,
    Timings,
    TokenEvent,
    TokenLogprob,
    Usage,
    VideoPart,
)

INFO = ModelInfo(
    model_id="fake/model:1",
    fingerprint="fp_fake",
    fusion="gated",
    fusion_trained=True,
    encoders=("qwen", "dinov2"),
    max_context_tokens=100,
    device="cpu",
    dtype="float32",
    num_parameters=42,
    created_unix=1_700_000_000,
)

PNG = b"\x89PNG a picture of something"
ANSWERS: dict[Arm, tuple[str, ...]] = {
    "fused": ("a", " red", " fox", ""),
    "qwen-only": ("a", " red", " dog", ""),
    "dinov2-only": ("a", " fox", ""),
    "blind": ("a", " thing", ""),
    "unfused": ("a", " red", " fox", ""),
}
#: Log-likelihood of every token of the fused answer under each arm; binary fractions, so sums are exact.
SCORES: dict[Arm, float] = {"fused": -0.125, "qwen-only": -0.5, "dinov2-only": -1.0, "blind": -2.0, "unfused": -0.25}
STAGES = {"decode": 0.001, "resize": 0.0005, "patchify": 0.0005}
TIMINGS = Timings(0.001, 0.002, 0.003, 0.004, 0.005, {"qwen": 0.002, "dinov2": 0.001}, STAGES, 0.0005)


@dataclass
class _Row:
    request: GenerationRequest
    words: tuple[str, ...]
    num_images: int
    num_done: int = 0


@dataclass
class FakeEngine:
    """Says `ANSWERS[arm]`, the last token being the end. Texts in the last message throw switches:

    "forever": says one word and never ends by itself; "count": as many words as max_tokens; "seed": says its seed;
    "break": the row fails, "break last": only that of the third choice; "lose": the engine forgets the request;
    "memory": the row is out of it; "die": the step raises. `hold()` stops all steps until `release()`; `seen` is
    every prepared request, `forked` those that shared another's preparation, `num_decoded` counts images; `added` and
    `aborted` are ids as they came and went; `passes` has the pictures of each pass of the encoders, one a request;
    `counters` goes into `stats`, over what it counts itself.
    """

    info: ModelInfo = INFO
    seen: list[GenerationRequest] = field(default_factory=list)
    forked: list[GenerationRequest] = field(default_factory=list)
    num_decoded: int = 0
    added: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)
    rows: OrderedDict[str, _Row] = field(default_factory=OrderedDict)
    _open: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _idle: threading.Event = field(default_factory=threading.Event)
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    passes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open.set()

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def wait_until(self, reached, timeout: float = 10.0) -> None:
        """Block the test until `reached()`, which is looked at after every change of the engine."""
        with self._changed:
            assert self._changed.wait_for(reached, timeout), "the engine never got there"

    def _note(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def prepare(self, request: GenerationRequest) -> _Row:
        self.seen.append(request)
        self._note()
        text = _text(request)
        media = [part for m in request.messages for part in m.parts if isinstance(part, (ImagePart, VideoPart))]
        for part in media:
            for image in part.frames if isinstance(part, VideoPart) else (part.image,):
                with self._changed:
                    self.num_decoded += 1
                if not image.startswith(b"\x89PNG"):
                    raise ImageParseError("the image can't be decoded", allowed="a whole PNG", param="messages")
        if len(text) > self.info.max_context_tokens:
            raise ContextLengthError("the prompt does not fit", value=len(text), allowed="100 tokens", param="messages")
        if "bad prepare" in text:
            raise KeyError("secret user text")
        words = ANSWERS[request.arm]
        if "forever" in text:
            words = ("x",) * 2
        elif "seed" in text:
            words = (str(request.sampling.seed), "")
        elif "count" in text:
            words = ("x",) * request.sampling.max_tokens
        return _Row(request, words, len(media))

    def fork(self, prepared: _Row, request: GenerationRequest) -> _Row:
        self.forked.append(request)
        self._note()
        row = _Row(request, prepared.words, prepared.num_images)
        if "seed" in _text(request):
            row.words = (str(request.sampling.seed), "")
        return row

    def add_request(self, prepared: _Row) -> None:
        if "refuse" in _text(prepared.request):
            raise ValueError("refused")
        self.added.append(prepared.request.request_id)
        self.rows[prepared.request.request_id] = prepared
        self._note()

    def abort(self, request_id: str) -> None:
        self.rows.pop(request_id, None)
        self.aborted.append(request_id)
        self._note()

    def has_work(self) -> bool:
        return bool(self.rows)

    def stats(self) -> EngineStats:
        own = {
            "num_running": len(self.rows),
            "num_steps": self.num_steps,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generation_tokens": self.num_generation_tokens,
            "num_images_encoded": 2 * sum(self.passes),
            "encoder_seconds": {name: one * len(self.passes) for name, one in TIMINGS.encoder_seconds.items()},
            "encoder_tokens": {name: 4 * sum(self.passes) for name in TIMINGS.encoder_seconds},
            "encoder_batches": {name: dict(Counter(self.passes)) for name in TIMINGS.encoder_seconds},
        }
        return EngineStats(**own | self.counters)

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        return f"<{token_id}>", [token_id]

    def step(self) -> list[TokenEvent]:
        # Bounded, as the protocol asks: commands must get through while tests hold the engine.
        if not self._open.wait(0.005):
            return []
        self.num_steps += 1
        self.batch_sizes.append(len(self.rows))
        events = [event for row in list(self.rows.values()) for event in self._advance(row)]
        self._note()
        if not events:
            self._idle.wait(0.005)
        return events

    def _advance(self, row: _Row) -> list[TokenEvent]:
        text, request_id = _text(row.request), row.request.request_id
        if (trouble := self._trouble(row, text)) is not None:
            return trouble
        if "forever" in text and row.num_done == 1:
            return []
        event = TokenEvent(request_id)
        if row.num_done == 0:
            event = replace(event, fusion=_fusion(row), usage=self._usage(row))
            self.passes += [row.num_images] if row.num_images else []
            self.num_prompt_tokens += event.usage.prompt_tokens
        if row.request.encode_only:
            return [self._end(row, event, "stop")]
        if row.request.score_token_ids is not None:
            score = SCORES[row.request.arm]
            return [self._end(row, replace(event, score_logprobs=(score,) * len(row.request.score_token_ids)), "stop")]
        word = row.words[row.num_done]
        row.num_done += 1
        self.num_generation_tokens += 1
        event = replace(event, text=word, token_ids=(len(word),), logprobs=_logprobs(row, len(word)))
        if word == "":
            return [self._end(row, event, "stop")]
        if row.num_done == row.request.sampling.max_tokens:
            return [self._end(row, event, "length")]
        return [event]

    def _trouble(self, row: _Row, text: str) -> list[TokenEvent] | None:
        request_id = row.request.request_id
        if "die" in text:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if "lose" in text:
            del self.rows[request_id]
            return []
        breaks = "break last" not in text or request_id.endswith("-2")
        if "break" in text and breaks and row.num_done == 1:
            del self.rows[request_id]
            return [TokenEvent(request_id, error=RequestFailedError("NaN in secret user text"))]
        if "memory" in text:
            del self.rows[request_id]
            return [TokenEvent(request_id, error=OutOfDeviceMemoryError("48 GiB of secret device is full"))]
        return None

    def _end(self, row: _Row, event: TokenEvent, reason: FinishReason) -> TokenEvent:
        del self.rows[row.request.request_id]
        return replace(event, finish_reason=reason, usage=self._usage(row), timings=TIMINGS)

    def _usage(self, row: _Row) -> Usage:
        image_tokens = 4 * row.num_images
        text, pixels = len(_text(row.request)), (64 * 64,) * row.num_images
        return Usage(text + image_tokens, row.num_done, image_tokens, cached_tokens=2, image_pixels=pixels)


def _text(request: GenerationRequest) -> str:
    return "".join(part.text for m in request.messages for part in m.parts if isinstance(part, TextPart))


def _logprobs(row: _Row, token_id: int) -> tuple[TokenLogprob, ...] | None:
    """The chosen token, another one, and one that was forbidden; as many as asked for."""
    num_top = row.request.sampling.logprobs
    if num_top is None:
        return None
    top = ((token_id, -0.25), (70, -1.5), (71, float("-inf")))
    return (TokenLogprob(token_id, -0.25, top[:num_top]),)


def _fusion(row: _Row) -> tuple[FusionWeights, ...]:
    weights = FusionWeights(
        weights={"qwen": 0.75, "dinov2": 0.25},
        dominant_encoder="qwen",
        fusion_trained=True,
        entropy=0.8125,
        contribution={"qwen": 0.5, "dinov2": 0.5},
        relative_update=0.25,
        warnings=("only the first frame was used",),
    )
    return (weights,) * row.num_images
