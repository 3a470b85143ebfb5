"""What one request brings or meets is its own: a bad picture, a bad prompt, its end at any stage."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from model_core.checkpoint import Loaded
from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.engine.engine import ContinuousEngine
from model_core.engine.sequence import Sequence
from model_core.errors import RequestFailedError
from model_core.processing.batch import ModelInputs, normalise_pixels
from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart, TokenEvent
from tests.model_core import tiny
from tests.model_core.engine.test_batching import SETTINGS, cache_of
from tests.model_core.engine.test_engine import fold, picture, random_request, run


@functools.cache
def loaded() -> Loaded:
    return Loaded(tiny.trained_model(), tiny.processor())


def encoder_of(config: EngineConfig | None = None) -> DualVisionEncoder:
    """An engine of its own; they share the one model."""
    return DualVisionEncoder.from_loaded(loaded(), "tiny", config)


@functools.cache
def lonely() -> tuple[DualVisionEncoder, dict[str, tuple[int, ...]]]:
    """An engine that keeps nothing, for one request at a time, and what it has answered. A name is one request here."""
    return encoder_of(SETTINGS["no caches at all"]), {}


def alone(requests: list[GenerationRequest]) -> dict[str, tuple[int, ...]]:
    encoder, answers = lonely()
    for request in requests:
        if request.request_id not in answers:
            answers[request.request_id] = run(encoder, [request])[request.request_id].token_ids
    return {r.request_id: answers[r.request_id] for r in requests}


def pictured(name: str, seed: int, **sampling: object) -> GenerationRequest:
    message = ChatMessage("user", (ImagePart(picture(random.Random(seed))), TextPart("what?")))
    return GenerationRequest(name, (message,), SamplingParams(**({"max_tokens": 6, "ignore_eos": True} | sampling)))


def drain(engine: ContinuousEngine, merged: dict[str, TokenEvent]) -> None:
    """Step to the end; the events of each request folded into one."""
    while engine.has_work():
        for event in engine.step():
            assert not merged[event.request_id].is_terminal, "an event after the last one"
            merged[event.request_id] = fold(merged[event.request_id], event)


def assert_empty(engine: ContinuousEngine) -> None:
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert engine.runner.store.num_open == 0
    assert not engine.has_work()


def poison(encoder: DualVisionEncoder, inputs: ModelInputs, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """This encoder's features of that picture are never finite. Returns how many pictures each of its passes had."""
    adapter, passes = encoder.model.model.encoders[name], []
    infer, bad = adapter.infer, normalise_pixels(inputs.pixels, encoder.format.patches, torch.device("cpu"))

    def poisoned(module: torch.nn.Module, pixel_values: torch.Tensor, grid: torch.Tensor) -> object:
        found = infer(module, pixel_values, grid)
        patches = pixel_values.split(grid.prod(-1).tolist())
        for tokens, mine in zip(found.tokens.split(found.lengths), patches, strict=True):
            if torch.equal(mine, bad):
                tokens.fill_(float("nan"))
                passes.append(len(grid))
        return found

    monkeypatch.setattr(adapter, "infer", poisoned)
    return passes


@pytest.mark.parametrize("name", ["qwen", "dinov2"])
def test_a_poisoned_picture_among_32_requests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """31 answer as each does alone, one ends with its error, and the engine goes on."""
    good = [random_request(seed, max_tokens=6) for seed in range(31)]
    more = random_request(100, max_tokens=6)
    expected = alone([*good, more])
    encoder = encoder_of()
    bad = pictured("bad", 1000)
    passes = poison(encoder, encoder.engine.prepare(bad).inputs, name, monkeypatch)
    merged = run(encoder, [*good[:2], bad, *good[2:]])
    assert max(passes) > 4, "it was in a pass with others"
    assert isinstance(merged["bad"].error, RequestFailedError)
    assert "an image gave features that are not finite" in str(merged["bad"].error), "before it cost a step"
    assert [e.request_id for e in merged.values() if e.error is not None] == ["bad"]
    assert {r.request_id: merged[r.request_id].token_ids for r in good} == {
        r.request_id: expected[r.request_id] for r in good
    }
    assert run(encoder, [more])[more.request_id].token_ids == expected[more.request_id]
    assert_empty(encoder.engine)


def one_less(types: list[int]) -> list[int]:
    at = types.index(1)
    return [*types[:at], 0, *types[at + 1 :]]


def one_more(types: list[int]) -> list[int]:
    return [1, *types[1:]]


@pytest.mark.parametrize("change", [one_less, one_more])
def test_placeholders_that_the_features_do_not_fill(change: Callable[[list[int]], list[int]]) -> None:
    """A prompt with another number of places than its pictures have tokens ends alone, and says both numbers."""
    good = [random_request(seed, max_tokens=6) for seed in range(6)]
    expected = alone(good)
    engine = encoder_of().engine
    bad = engine.prepare(pictured("bad", 1))
    num_tokens = bad.inputs.num_image_tokens
    bad.inputs = replace(bad.inputs, token_types=change(bad.inputs.token_types))
    for prepared in (*map(engine.prepare, good[:3]), bad, *map(engine.prepare, good[3:])):
        engine.add_request(prepared)
    merged = {name: TokenEvent(name) for name in ("bad", *expected)}
    drain(engine, merged)
    wrong = num_tokens + (1 if change is one_more else -1)
    assert isinstance(merged["bad"].error, RequestFailedError)
    assert f"image tokens and placeholders differ. Got: {num_tokens} and {wrong}." in str(merged["bad"].error)
    assert {name: merged[name].token_ids for name in expected} == expected
    assert (bad.embeds, bad.blocks) == (None, [])
    assert_empty(engine)


@dataclass
class Scene:
    """An engine that has been brought to a stage of `victim`'s life, with others beside it."""

    engine: ContinuousEngine
    now: list[float]
    victim: Sequence
    merged: dict[str, TokenEvent]

    def step(self) -> None:
        for event in self.engine.step():
            self.merged[event.request_id] = fold(self.merged[event.request_id], event)


LONG = "z" * 70
STAGES: dict[str, tuple[EngineConfig, Callable[[Scene], bool]]] = {
    "before encoding": (EngineConfig(max_encode_tokens=4), lambda s: s.victim.embeds is None),
    "waiting for a seat": (
        EngineConfig(max_num_seqs=1),
        lambda s: s.victim in s.engine.scheduler.waiting and s.victim.embeds is not None,
    ),
    "between chunks of its prompt": (
        EngineConfig(max_num_seqs=4, max_num_batched_tokens=24),
        lambda s: 0 < s.victim.num_computed < s.victim.num_prompt and s.victim in s.engine.scheduler.running,
    ),
    "mid-decode": (EngineConfig(), lambda s: len(s.victim.token_ids) == 3),
    "preempted": (
        EngineConfig(max_context_tokens=400, kv_cache_bytes=cache_of(400), max_num_seqs=4),
        lambda s: s.victim in s.engine.scheduler.preempted and s.victim not in s.engine.runner.store,
    ),
}


def set_scene(stage: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Scene, list[GenerationRequest]]:
    config, is_there = STAGES[stage]
    engine, now = encoder_of(config).engine, [0.0]
    monkeypatch.setattr(engine.runner, "clock", lambda: now[0])
    others = [pictured(f"o{n}", n, max_tokens=30) for n in range(2)]
    victim = replace(pictured("victim", 7, max_tokens=40), timeout_seconds=60.0)
    victim = replace(victim, messages=(ChatMessage("user", (*victim.messages[0].parts, TextPart(LONG))),))
    prepared = engine.prepare(victim)
    scene = Scene(engine, now, prepared, {r.request_id: TokenEvent(r.request_id) for r in (victim, *others)})
    for one in (*map(engine.prepare, others), prepared):
        engine.add_request(one)
    for _ in range(200):
        scene.step()
        if is_there(scene):
            return scene, others
    raise AssertionError(f"it was never {stage}")


@pytest.mark.parametrize("end", ["abort", "deadline"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_end_at_any_stage_frees_everything(stage: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, others = set_scene(stage, monkeypatch)
    engine, victim = scene.engine, scene.victim
    if end == "abort":
        engine.abort("victim")
        assert (victim.embeds, victim.blocks) == (None, []), "at once, not with the next step"
        assert victim not in engine.runner.store
        held = sum(len(s.blocks) for s in engine.scheduler.running)
        assert engine.blocks.num_blocks - engine.blocks.num_free <= held
    else:
        scene.now[0] = 60.0
    drain(engine, scene.merged)
    assert victim not in engine.runner.store
    assert (victim.embeds, victim.blocks) == (None, [])
    assert scene.merged["victim"].is_terminal == (end == "deadline")
    assert isinstance(scene.merged["victim"].error, RequestFailedError) == (end == "deadline")
    assert {r.request_id: scene.merged[r.request_id].token_ids for r in others} == alone(others)
    assert_empty(engine)
    again = replace(victim.request, timeout_seconds=None)
    assert run_again(engine, again) == alone([again])["victim"]


def run_again(engine: ContinuousEngine, request: GenerationRequest) -> tuple[int, ...]:
    """The same id may come again, and what was left in the caches is right."""
    engine.add_request(engine.prepare(request))
    merged = {request.request_id: TokenEvent(request.request_id)}
    drain(engine, merged)
    return merged[request.request_id].token_ids
