"""The engine gives what `generate` gives, whoever else is in the batch; and one bad row ends alone."""

from __future__ import annotations

import math
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.errors import ContextLengthError, InvalidRequestError, RequestFailedError
from model_core.model import DualVisionModel
from model_core.processing.batch import normalise_pixels
from model_core.types import (
    Arm,
    ChatMessage,
    GenerationRequest,
    ImagePart,
    SamplingParams,
    TextPart,
    TokenEvent,
    VideoPart,
)
from tests.model_core import tiny


def picture(rng: random.Random) -> Image.Image:
    size = (rng.randint(30, 160), rng.randint(30, 160))
    return Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))


def random_request(number: int, **sampling: object) -> GenerationRequest:
    rng = random.Random(number)
    parts = [ImagePart(picture(rng)) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    parts.append(TextPart("".join(rng.choices("abcdefgh ?", k=rng.randint(1, 80)))))
    rng.shuffle(parts)
    options = {"max_tokens": rng.randint(1, 16), "ignore_eos": True} | sampling
    return GenerationRequest(f"r{number}", (ChatMessage("user", tuple(parts)),), SamplingParams(**options))


def fold(so_far: TokenEvent, event: TokenEvent) -> TokenEvent:
    """Two events of one request as one: text, ids and log-probabilities joined, the later one's outcome."""
    return replace(
        event,
        text=so_far.text + event.text,
        token_ids=so_far.token_ids + event.token_ids,
        logprobs=None if event.logprobs is None else (so_far.logprobs or ()) + event.logprobs,
        fusion=so_far.fusion if event.fusion is None else event.fusion,
    )


def run(encoder: DualVisionEncoder, requests: list[GenerationRequest], arrive: int = 99) -> dict[str, TokenEvent]:
    """All requests through one engine, `arrive` new ones a step; the events of each merged."""
    engine, merged, left = encoder.engine, {r.request_id: TokenEvent(r.request_id) for r in requests}, list(requests)
    while left or engine.has_work():
        for request in left[:arrive]:
            engine.add_request(engine.prepare(request))
        left = left[arrive:]
        for event in engine.step():
            assert not merged[event.request_id].is_terminal, "an event after the last one"
            merged[event.request_id] = fold(merged[event.request_id], event)
    assert all(event.is_terminal for event in merged.values())
    assert engine.runner.store.num_open == 0, "a row was leaked"
    return merged


def as_arm(model: DualVisionModel, arm: Arm) -> AbstractContextManager[object]:
    """`generate` knows no arms: while this is open, the features of its images and videos are what this arm leaves."""
    if arm == "fused":
        return nullcontext()

    def features(pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> BaseModelOutputWithPooling:
        tokens = model.embed_images(pixel_values, grid_thw, [arm] * len(grid_thw)).tokens
        cells = grid_thw.prod(-1) // model.config.merge_size**2 * model.fusion.tokens_per_cell
        return BaseModelOutputWithPooling(pooler_output=tokens.split(cells.tolist()))

    # `generate` looks at the names of the parameters.
    return mock.patch.multiple(
        model.model,
        get_image_features=lambda pixel_values, image_grid_thw, **_: features(pixel_values, image_grid_thw),
        get_video_features=lambda pixel_values_videos, video_grid_thw, **_: features(
            pixel_values_videos, video_grid_thw
        ),
    )


def model_inputs(encoder: DualVisionEncoder, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """The request as transformers' forward takes it: images as images, videos as videos."""
    inputs = encoder.engine.prepare(request).inputs
    found = {"input_ids": torch.tensor([inputs.input_ids]), "mm_token_type_ids": torch.tensor([inputs.token_types])}
    if inputs.pixels is None:
        return found
    values = normalise_pixels(inputs.pixels, encoder.format.patches, torch.device("cpu"))
    each = values.split([math.prod(grid) for grid in inputs.grids])
    media = [part for message in request.messages for part in message.parts if not isinstance(part, TextPart)]
    for kind, pixels, grids in (
        (ImagePart, "pixel_values", "image_grid_thw"),
        (VideoPart, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [number for number, part in enumerate(media) if isinstance(part, kind)]
        if chosen:
            found[pixels] = torch.cat([each[number] for number in chosen])
            found[grids] = torch.tensor([inputs.grids[number] for number in chosen])
    if rates := [part.fps for part in media if isinstance(part, VideoPart)]:
        found["second_per_grid_ts"] = torch.tensor([encoder.format.patches.temporal_patch_size / r for r in rates])
    return found


def generated(encoder: DualVisionEncoder, request: GenerationRequest) -> tuple[list[int], list[float]]:
    """transformers' own greedy ids on the same prompt, and the margin of each choice over the next best."""
    inputs = model_inputs(encoder, request)
    with as_arm(encoder.model, request.arm):
        out = encoder.model.generate(
            **inputs,
            max_new_tokens=request.sampling.max_tokens,
            min_new_tokens=request.sampling.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = [step[0].float().topk(2).values for step in out.logits]
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), [float(b[0] - b[1]) for b in best]


@pytest.mark.parametrize("arrive", [1, 3, 99])
def test_greedy_equals_generate_in_any_mix(arrive: int) -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(max_num_seqs=4))
    requests = [random_request(seed) for seed in range(12)]
    for request in requests:
        expected, margins = generated(encoder, request)
        if arrive == 1:
            requests_alone = run(encoder, [request])[request.request_id].token_ids
            assert agrees(list(requests_alone), expected, margins)
    together = run(encoder, requests, arrive)
    for request in requests:
        expected, margins = generated(encoder, request)
        assert agrees(list(together[request.request_id].token_ids), expected, margins), request.request_id


def agrees(got: list[int], expected: list[int], margins: list[float]) -> bool:
    """Equal up to the first choice between two logits closer than 1e-4, where either may come."""
    for a, b, margin in zip(got, expected, margins, strict=True):
        if a != b:
            return margin < 1e-4
    return True


def test_seeded_sampling_is_the_same_alone_and_in_a_batch() -> None:
    encoder = tiny.encoder()
    requests = [random_request(seed, temperature=1.0, seed=seed, top_p=0.9, max_tokens=8) for seed in range(6)]
    together = run(encoder, requests)
    for request in requests:
        assert run(encoder, [request])[request.request_id].token_ids == together[request.request_id].token_ids
    other = random_request(1, temperature=1.0, seed=99, top_p=0.9, max_tokens=8)
    assert run(encoder, [other])["r1"].token_ids != together["r1"].token_ids


def test_arms_share_a_batch_and_keep_apart() -> None:
    encoder = tiny.encoder()
    base = random_request(3, max_tokens=6)
    arms = ("fused", "qwen-only", "dinov2-only", "blind", "unfused")
    requests = [GenerationRequest(f"a-{arm}", base.messages, base.sampling, arm) for arm in arms]
    together = run(encoder, requests)
    for request in requests:
        assert run(encoder, [request])[request.request_id].token_ids == together[request.request_id].token_ids
        assert len(together[request.request_id].fusion) == len(together["a-fused"].fusion)


def test_scores_are_the_teacher_forced_log_likelihoods() -> None:
    encoder = tiny.encoder()
    request = random_request(5, max_tokens=6)
    answer = run(encoder, [request])["r5"].token_ids
    scored = run(encoder, [GenerationRequest("s", request.messages, score_token_ids=answer)])["s"]
    inputs = encoder.engine.prepare(GenerationRequest("p", request.messages, score_token_ids=answer)).inputs
    expected, _ = generated(encoder, request)
    assert list(answer) == expected
    assert scored.usage.prompt_tokens == len(inputs.input_ids) - len(answer)
    assert scored.finish_reason == "stop"
    assert len(scored.score_logprobs) == len(answer)
    worse = run(encoder, [GenerationRequest("w", request.messages, score_token_ids=tuple(reversed(answer)))])["w"]
    assert sum(scored.score_logprobs) > sum(worse.score_logprobs)


def test_video_is_one_entry_and_its_tokens_are_counted() -> None:
    encoder, rng = tiny.encoder(), random.Random(0)
    frames = tuple(Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)) for _ in range(3))
    message = ChatMessage("user", (VideoPart(frames, 2.0), TextPart("what?")))
    event = run(encoder, [GenerationRequest("v", (message,), SamplingParams(max_tokens=3, ignore_eos=True))])["v"]
    assert len(event.fusion) == 1
    assert event.usage.image_tokens == 2 * 2 * 2


def test_an_encode_that_raises_for_one_is_retried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder()
    original = encoder.engine.runner._encode_images

    def picky(sequences: list) -> None:
        if any(s.request_id == "r1" for s in sequences):
            raise RuntimeError("out of memory, say")
        original(sequences)

    monkeypatch.setattr(encoder.engine.runner, "_encode_images", picky)
    seeds = [
        s
        for s in range(12)
        if random_request(s).messages[0].parts and encoder.engine.prepare(random_request(s)).inputs.grids
    ]
    assert 1 in seeds
    merged = run(encoder, [random_request(seed, max_tokens=3) for seed in seeds[:4]])
    assert isinstance(merged["r1"].error, RequestFailedError)
    assert sum(event.error is None for event in merged.values()) == 3


def test_a_row_that_fails_the_forward_ends_alone_and_a_passing_fault_ends_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step's RuntimeError reached every row of the batch."""
    encoder = tiny.encoder(engine_config=EngineConfig(max_num_seqs=4))
    requests = [random_request(number, max_tokens=8) for number in range(4)]
    undisturbed = run(encoder, requests)
    original, calls = encoder.engine.runner.run, []

    def fails(chunks: list, *chosen: torch.Tensor) -> torch.Tensor:
        calls.append(len(chunks))
        hidden = original(chunks, *chosen)  # as far as the cache: a step that is run again must not see it
        hurt = any(c.sequence.request_id == "r2" and len(c.sequence.token_ids) == 3 for c in chunks)
        if len(calls) == 3 or hurt:
            raise RuntimeError("out of memory, say")
        return hidden

    monkeypatch.setattr(encoder.engine.runner, "run", fails)
    merged = run(encoder, requests)
    assert [name for name, event in merged.items() if event.error is not None] == ["r2"]
    assert all(merged[n].token_ids == undisturbed[n].token_ids for n in merged if n != "r2")
    assert merged["r2"].token_ids == undisturbed["r2"].token_ids[:3]


def test_a_prompt_past_the_context_is_refused_with_its_counts() -> None:
    encoder = tiny.encoder()
    message = ChatMessage("user", (TextPart("x" * 3000),))
    with pytest.raises(ContextLengthError, match=r"30\d\d tokens .* 2047 tokens"):
        encoder.engine.prepare(GenerationRequest("long", (message,)))


def test_max_tokens_stops_at_the_context() -> None:
    encoder = tiny.encoder()
    message = ChatMessage("user", (TextPart("x" * 1990),))
    params = SamplingParams(max_tokens=32768, ignore_eos=True)
    event = run(encoder, [GenerationRequest("long", (message,), params)])["long"]
    assert event.usage.prompt_tokens + event.usage.completion_tokens == 2048
    assert event.finish_reason == "length"


def test_a_request_id_is_in_the_engine_once() -> None:
    encoder = tiny.encoder()
    prepared = encoder.engine.prepare(random_request(0))
    encoder.engine.add_request(prepared)
    with pytest.raises(InvalidRequestError, match="already in the engine"):
        encoder.engine.add_request(encoder.engine.prepare(random_request(0)))
