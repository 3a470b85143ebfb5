"""What the engine tells of a request's pictures: sizes, the stages of preparing them, encoder batches."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart, TokenEvent, VideoPart
from tests.model_core import tiny


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def request(name: str, seed: int, **more: object) -> GenerationRequest:
    parts = (
        ImagePart(picture(64, 80, seed)),
        VideoPart((picture(60, 60, seed + 1), picture(60, 60, seed + 2))),
        TextPart("what?"),
    )
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    return GenerationRequest(name, (ChatMessage("user", parts),), sampling, **more)


def finish(encoder, requests: list[GenerationRequest]) -> dict[str, TokenEvent]:
    for one in requests:
        encoder.engine.add_request(encoder.engine.prepare(one))
    ends: dict[str, TokenEvent] = {}
    while encoder.engine.has_work():
        ends |= {event.request_id: event for event in encoder.engine.step() if event.is_terminal}
    return ends


def test_sizes_and_stages() -> None:
    end = finish(tiny.encoder(), [request("r", 0, fetch_seconds=1000.0)])["r"]
    assert end.usage.image_pixels == (64 * 80, 60 * 60, 60 * 60)
    assert set(end.timings.preprocess_stages) == {"decode", "resize", "patchify"}
    assert end.timings.preprocess_seconds == pytest.approx(1000 + sum(end.timings.preprocess_stages.values()), abs=60)
    assert end.timings.preprocess_seconds > 1000, "what was fetched counts, and so does the rest"
    text = GenerationRequest("t", (ChatMessage("user", (TextPart("hi"),)),), SamplingParams(max_tokens=1))
    end = finish(tiny.encoder(), [text])["t"]
    assert end.usage.image_pixels == () and end.timings.preprocess_stages == {}


def test_batches_of_the_encoders() -> None:
    encoder = tiny.encoder()
    finish(encoder, [request("a", 0), request("b", 10)])
    assert encoder.engine.stats().encoder_batches == {"qwen": {4: 1}, "dinov2": {4: 1}}
    finish(encoder, [request("c", 0), request("d", 20, arm="qwen-only")])
    assert encoder.engine.stats().encoder_batches == {"qwen": {4: 1, 2: 1}, "dinov2": {4: 1}}
