"""A closed loop of requests on the engine, and the same work as static batches of transformers' `generate`.

In: requests and a clock. Out: a timing for each request, and a round's figures. No HTTP, no thread: a request is
prepared in the same thread that turns the engine, so a server with a preprocessing pool can do better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from model_core.analysis.latency import STAGES, RequestTiming, hit_ratios, stage_shares
from model_core.analysis.workload import GREEDY, SamplingLoad
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor
from model_core.types import Engine, EngineStats, GenerationRequest, Timings, TokenEvent

Clock = Callable[[], float]


@dataclass(slots=True)
class EngineRun:
    """seconds: from the first request to the last; figures: cache hit rates and shares of time over the run."""

    timings: list[RequestTiming]
    seconds: float
    figures: dict[str, float]


@dataclass(slots=True)
class _Row:
    start: float
    pieces: list[float] = field(default_factory=list)


def run_closed_loop(engine: Engine, requests: Sequence[GenerationRequest], concurrency: int, clock: Clock) -> EngineRun:
    """At most `concurrency` requests at once; where one ends, the next begins.

    A request starts when its place falls free: what it then waits for its own preprocessing, or for that of the
    requests before it, is in its TTFT.
    Raises:
        InputError: a request that the engine refuses.
    """
    before, begin = engine.stats(), clock()
    waiting, free = iter(requests), [begin] * concurrency
    rows: dict[str, _Row] = {}
    timings: list[RequestTiming] = []
    spent: list[Timings] = []
    while True:
        while free and (request := next(waiting, None)) is not None:
            rows[request.request_id] = _Row(free.pop(0))
            engine.add_request(engine.prepare(request))
        if not rows:
            break
        events = engine.step()
        now = clock()
        for event in events:
            row = rows[event.request_id]
            row.pieces += [now] * bool(event.token_ids)
            if event.is_terminal:
                timings.append(_timing(rows.pop(event.request_id), event, now))
                spent += [event.timings] if event.timings is not None else []
                free.append(now)
    seconds = clock() - begin
    return EngineRun(timings, seconds, _figures(before, engine.stats(), spent, seconds))


def _timing(row: _Row, event: TokenEvent, now: float) -> RequestTiming:
    usage = event.usage
    return RequestTiming(
        start=row.start,
        end=now,
        pieces=tuple(row.pieces),
        num_tokens=usage.completion_tokens if usage else len(row.pieces),
        num_prompt_tokens=usage.prompt_tokens if usage else 0,
        error=None if event.error is None else str(event.error),
    )


def _figures(before: EngineStats, after: EngineStats, spent: Sequence[Timings], seconds: float) -> dict[str, float]:
    hits = _grown(before.encoder_cache_hits, after.encoder_cache_hits)
    misses = _grown(before.encoder_cache_misses, after.encoder_cache_misses)
    lookups = {name: hits.get(name, 0) + misses.get(name, 0) for name in hits | misses}
    hits["prefix"] = after.prefix_cache_hits - before.prefix_cache_hits
    lookups["prefix"] = after.prefix_cache_queries - before.prefix_cache_queries
    busy = _grown(before.encoder_seconds, after.encoder_seconds)
    return {
        **hit_ratios(hits, lookups),
        **stage_shares({stage: sum(getattr(one, f"{stage}_seconds") for one in spent) for stage in STAGES}),
        **{f"{name}_wall_share": value / seconds for name, value in busy.items()},
    }


def _grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - before.get(name, 0) for name in after}


def run_generate(
    model: DualVisionModel,
    processor: DualVisionProcessor,
    items: Sequence[tuple[str, bytes | None]],
    batch_size: int,
    num_tokens: int,
    clock: Clock,
    *,
    sampling: SamplingLoad = GREEDY,
) -> tuple[list[RequestTiming], float]:
    """Answers of exactly `num_tokens` in batches of `batch_size`; preprocessing is counted.

    Args:
        items: question and JPEG of each request; None for no picture.
        sampling: but for its seed: `generate` draws for the whole batch from torch's one generator.
    Returns:
        a timing for each request, whose answer comes whole at its batch's end; seconds over all.
    """
    begin = clock()
    timings = []
    for at in range(0, len(items), batch_size):
        start = clock()
        num_prompt_tokens = _generate(model, processor, items[at : at + batch_size], num_tokens, sampling)
        end = clock()
        timings += [RequestTiming(start, end, (), num_tokens, count) for count in num_prompt_tokens]
    return timings, clock() - begin


@torch.inference_mode()
def _generate(
    model: DualVisionModel,
    processor: DualVisionProcessor,
    items: Sequence[tuple[str, bytes | None]],
    num_tokens: int,
    sampling: SamplingLoad,
) -> list[int]:
    """The prompts' lengths. The answers are read back, as any user of them would."""
    texts = [
        processor.tokenizer.apply_chat_template(_turns(*item), tokenize=False, add_generation_prompt=True)
        for item in items
    ]
    pictures = [jpeg for _, jpeg in items if jpeg is not None]
    inputs = processor(images=pictures or None, text=texts).to(model.device)
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0.0:
        chosen = {"do_sample": True, **replace(sampling, seed=None).fields(0)}
    output = model.generate(**inputs, **chosen, min_new_tokens=num_tokens, max_new_tokens=num_tokens)
    answers = output[:, inputs["input_ids"].shape[1] :].cpu()
    processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    counts: list[int] = inputs["attention_mask"].sum(1).tolist()
    return counts


def _turns(question: str, jpeg: bytes | None) -> list[dict[str, Any]]:
    text = {"type": "text", "text": question}
    return [{"role": "user", "content": question if jpeg is None else [{"type": "image"}, text]}]
