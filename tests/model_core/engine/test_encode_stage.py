"""A pass of the encoders never computes more than its budget, whatever one request brings along."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.errors import OutOfDeviceMemoryError
from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart, TokenEvent
from tests.model_core import tiny
from tests.model_core.engine.test_engine import picture, run


def album(name: str, numbers: list[int], arm: str = "fused") -> GenerationRequest:
    """Pictures of 16 cells each."""
    images = tuple(ImagePart(picture(random.Random(n)).resize((112, 112))) for n in numbers)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    return GenerationRequest(name, (ChatMessage("user", (*images, TextPart("?"))),), params, arm=arm)


def passes(encoder: DualVisionEncoder) -> dict[int, int]:
    return dict(encoder.engine.stats().encoder_batches["qwen"])


@pytest.mark.parametrize("cache_bytes", [2**26, 0], ids=["cache", "no cache"])
@pytest.mark.parametrize("arm", ["fused", "qwen-only"])
def test_a_request_of_many_images_takes_several_passes_and_answers_the_same(cache_bytes: int, arm: str) -> None:
    request = album("album", list(range(7)), arm)
    whole = tiny.encoder(engine_config=EngineConfig(max_encode_tokens=999))
    expected = run(whole, [request])["album"]
    encoder = tiny.encoder(engine_config=EngineConfig(max_encode_tokens=40, encoder_cache_bytes=cache_bytes))
    found = run(encoder, [request])["album"]
    assert (passes(whole), passes(encoder)) == ({7: 1}, {2: 3, 1: 1})
    assert found.token_ids == expected.token_ids
    assert [w.weights for w in found.fusion] == [pytest.approx(w.weights, abs=1e-5) for w in expected.fusion]
    assert encoder.engine.stats().encoder_tokens["qwen"] == 7 * 16
    assert found.timings.queue_seconds >= found.timings.encode_wait_seconds >= 0
    assert found.timings.encode_seconds >= sum(found.timings.encoder_seconds.values()) > 0


def test_others_are_answered_between_the_passes_of_a_large_request() -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(max_encode_tokens=16))
    engine = encoder.engine
    text = GenerationRequest(
        "text", (ChatMessage("user", (TextPart("hello"),)),), SamplingParams(max_tokens=20, ignore_eos=True)
    )
    for request in (text, album("album", list(range(6)))):
        engine.add_request(engine.prepare(request))
    tokens_before_album, events = 0, []
    while not any(event.request_id == "album" for event in events):
        events = engine.step()
        tokens_before_album += sum(len(event.token_ids) for event in events if event.request_id == "text")
    assert tokens_before_album >= 5


def test_an_image_above_the_budget_goes_alone() -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(max_encode_tokens=4))
    run(encoder, [album("album", [0, 1, 2])])
    assert passes(encoder) == {1: 3}


def test_what_is_kept_takes_nothing_of_the_budget() -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(max_encode_tokens=16))
    run(encoder, [album("first", [0])])
    engine = encoder.engine
    for n in range(4):
        engine.add_request(engine.prepare(album(f"again{n}", [0, 0, 0])))
    engine.step()
    assert engine.stats().num_encoding == 0, "one turn takes all of them"
    while engine.has_work():
        engine.step()
    assert passes(encoder) == {1: 1}


def test_a_request_that_leaves_between_its_passes_leaves_nothing() -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(max_encode_tokens=16))
    engine = encoder.engine
    sequence = engine.prepare(album("album", [0, 1, 2, 3]))
    engine.add_request(sequence)
    engine.step()
    assert sequence.held_features and engine.has_work()
    engine.abort("album")
    assert not sequence.held_features and not engine.has_work() and engine.stats().num_encoding == 0
    assert run(encoder, [album("album", [0, 1, 2, 3])])["album"].error is None


def test_a_pass_that_does_not_fit_is_tried_with_one_image_and_one_that_fits_nowhere_ends_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(max_encode_tokens=40))
    encoders, sizes, most = encoder.engine.runner.encoders, [], [1]
    forward = encoders._forward

    def limited(name: str, values: torch.Tensor, grids: torch.Tensor) -> object:
        sizes.append(len(grids))
        if len(grids) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(name, values, grids)

    monkeypatch.setattr(encoders, "_forward", limited)
    found: dict[str, TokenEvent] = run(encoder, [album("album", [0, 1, 2, 3])])
    assert found["album"].error is None and {1, 2} <= set(sizes)
    most[0] = 0
    failed = run(encoder, [album("big", [4, 5, 6]), album("kept", [0])])
    assert type(failed["big"].error) is OutOfDeviceMemoryError
    assert failed["kept"].error is None


def test_no_more_wait_with_their_pictures_encoded_than_there_are_seats() -> None:
    """But for those of better rank, and those that want no seat."""
    encoder = tiny.encoder(engine_config=EngineConfig(max_num_seqs=2))
    engine = encoder.engine
    for n in range(9):
        engine.add_request(engine.prepare(album(f"r{n}", [n])))
        engine.step()
    held = [s for s in engine._known.values() if s.embeds is not None]
    assert len(held) == 2 + 2
    assert engine.stats().num_encoding == 5
    engine.add_request(engine.prepare(replace(album("urgent", [20]), priority=-1)))
    engine.add_request(engine.prepare(replace(album("analysis", [21]), encode_only=True)))
    events = engine.step()
    assert engine._known["urgent"].embeds is not None
    assert [e.request_id for e in events if e.is_terminal] == ["analysis"]
    ended = set()
    while engine.has_work():
        ended |= {event.request_id for event in engine.step() if event.is_terminal}
    assert ended == {"urgent", *(f"r{n}" for n in range(9))}
