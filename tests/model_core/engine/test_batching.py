"""Chunks, prefix hits, preemption and caches change when work is done, never what comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model_core.encoder import DualVisionEncoder
from model_core.engine.config import BLOCK_SIZE, EngineConfig
from model_core.engine.decode_graphs import DecodeGraphs
from model_core.errors import ConfigError, ContextLengthError, RequestFailedError
from model_core.language import compiled
from model_core.language.compiled import CompiledLayers
from model_core.language.decoder import Decoder
from model_core.language.kv_cache import CacheShape
from model_core.language.paged import PagedStore
from model_core.processing.images import ImageLimits
from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart
from tests.model_core import tiny
from tests.model_core.engine.test_engine import agrees, generated, picture, random_request, run

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values, layers, kv heads, head dim, float32
ARMS = ("fused", "qwen-only", "dinov2-only", "blind", "unfused")


def cache_of(num_tokens: int) -> int:
    """Rows, and the copies of prefixes beside them."""
    return 2 * num_tokens * TOKEN_BYTES


def check(encoder: DualVisionEncoder, count: int, seed: int, most_tokens: int) -> None:
    """Random requests, in random arrival, against transformers' generate on the same model."""
    rng = random.Random(seed)
    requests = [random_request(seed * 1000 + n, max_tokens=rng.randint(1, most_tokens)) for n in range(count)]
    together = run(encoder, requests, rng.choice([1, 3, 99]))
    for request in requests:
        expected, margins = generated(encoder, request)
        event = together[request.request_id]
        assert event.error is None, event.error
        # A small cache is a short context: there an answer ends earlier than generate's.
        room = encoder.engine.info.max_context_tokens - event.usage.prompt_tokens
        expected, margins = expected[:room], margins[:room]
        assert agrees(list(event.token_ids), expected, margins), request.request_id


SETTINGS = {
    "chunks of a few tokens": EngineConfig(max_num_seqs=4, max_num_batched_tokens=7),
    "no caches at all": EngineConfig(enable_prefix_caching=False, encoder_cache_bytes=0),
    "steps launched ahead": EngineConfig(max_num_seqs=4, overlaps_steps=True),
    "preemption": EngineConfig(
        max_num_seqs=6, max_context_tokens=160, kv_cache_bytes=cache_of(160), max_num_batched_tokens=64
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_equals_generate_under(name: str) -> None:
    encoder = tiny.encoder(engine_config=SETTINGS[name])
    check(encoder, 7, 1, 16)
    if name == "preemption":
        assert encoder.engine.stats().num_preemptions > 0, "this test must preempt to mean something"


@pytest.mark.parametrize("longest", [compiled.MAX_PROMPT, 6])
def test_single_tokens_and_short_prompts_run_through_the_loops(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by_loops, by_torch, loops, decode = [], [], CompiledLayers.forward, Decoder.forward

    def count(self: CompiledLayers, hidden: torch.Tensor, *args: object) -> object:
        by_loops.append(len(hidden))
        return loops(self, hidden, *args)

    def count_others(self: Decoder, hidden: torch.Tensor, *args: object) -> torch.Tensor:
        by_torch.append(len(hidden))
        return decode(self, hidden, *args)

    monkeypatch.setattr(compiled, "MAX_PROMPT", longest)
    monkeypatch.setattr(CompiledLayers, "forward", count)
    monkeypatch.setattr(Decoder, "forward", count_others)
    encoder = tiny.encoder(engine_config=SETTINGS["chunks of a few tokens"])
    check(encoder, 7, 1, 16)
    if longest > 6:
        assert not by_torch and {1, 7} <= set(by_loops), "single tokens, and chunks as large as a step's budget"
    else:
        assert 1 in by_loops and by_torch and 1 not in by_torch, "torch takes longer prompts, and those alone"


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 256), ("cuda", 4096), ("mps", 4096)])
def test_the_size_of_a_pass_goes_by_the_device_unless_it_is_asked_for(device: str, tokens: int) -> None:
    assert EngineConfig().encode_tokens_on(device) == tokens
    assert EngineConfig(max_encode_tokens=10).encode_tokens_on(device) == 10


def test_a_pass_of_the_encoders_takes_no_more_than_that() -> None:
    one = picture(random.Random(9)).resize((112, 112))
    requests = [
        GenerationRequest(f"q{n}", (ChatMessage("user", (ImagePart(one.rotate(n)),)),), SamplingParams(max_tokens=2))
        for n in range(10)
    ]
    tokens = tiny.encoder().engine.prepare(requests[0]).inputs.num_image_tokens
    encoder = tiny.encoder(engine_config=EngineConfig(max_encode_tokens=4 * tokens))
    run(encoder, requests)
    assert encoder.engine.runner.encoders.batch_sizes["qwen"] == {4: 2, 2: 1}


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_equals_generate_on_many_requests(name: str) -> None:
    for seed in range(2, 12):
        check(tiny.encoder(engine_config=SETTINGS[name]), 20, seed, 48)


@pytest.mark.parametrize("name", ["chunks of a few tokens", "preemption"])
def test_greedy_equals_generate_over_paged_blocks_and_recorded_steps(name: str) -> None:
    """What runs on a GPU, here without one: blocks in one pool, decode steps through the graphs' buffers."""
    config = SETTINGS[name]
    encoder = tiny.encoder(engine_config=config)
    runner, decoder = encoder.engine.runner, encoder.engine.runner.decoder
    recorded: list[int] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            recorded.append(1)
            step()

        return replay

    num_blocks = encoder.engine.blocks.num_blocks
    runner.store = PagedStore(decoder.cache_shape, num_blocks, BLOCK_SIZE, backend="sdpa")
    runner.graphs = DecodeGraphs(
        decoder,
        runner.store,
        max_num_seqs=config.max_num_seqs,
        max_context_tokens=2048,
        joined=decoder.joined,
        capture=capture,
    )
    check(encoder, 7, 1, 16)
    assert len(recorded) > 10
    assert runner.graphs.is_available, runner.graphs.refusal


def test_a_second_time_comes_from_the_caches_and_is_the_same() -> None:
    encoder = tiny.encoder()
    requests = [random_request(number, max_tokens=6) for number in range(6)]
    first = run(encoder, requests)
    before = encoder.engine.stats()
    again = run(encoder, requests)
    after = encoder.engine.stats()
    for request in requests:
        one, two = first[request.request_id], again[request.request_id]
        assert one.token_ids == two.token_ids
        assert one.fusion == two.fusion
        prompt = two.usage.prompt_tokens
        assert two.usage.cached_tokens == (prompt - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert one.usage.cached_tokens < two.usage.cached_tokens or prompt <= BLOCK_SIZE
    assert after.num_images_encoded == before.num_images_encoded, "every feature was kept"
    assert after.prefix_cache_hits > before.prefix_cache_hits


def test_another_picture_another_place_another_arm_share_no_prefix() -> None:
    encoder, rng = tiny.encoder(), random.Random(5)
    one, other = picture(rng), picture(rng)
    other = other.resize(one.size)
    words = TextPart("w" * 40)

    def ask(number: int, *parts: object, arm: str = "fused") -> GenerationRequest:
        return GenerationRequest(f"q{number}", (ChatMessage("user", parts),), SamplingParams(max_tokens=4), arm)

    first = ask(0, ImagePart(one), words)
    run(encoder, [first])
    image_at = encoder.engine.prepare(first).image_places or encoder.engine.prepare(first).inputs.spans[0][0]
    for number, request in enumerate([ask(1, ImagePart(other), words), ask(2, ImagePart(one), words, arm="blind")], 1):
        event = run(encoder, [request])[f"q{number}"]
        assert event.usage.cached_tokens <= (image_at if request.arm == "fused" else 0)
        alone = run(tiny.encoder(engine_config=SETTINGS["no caches at all"]), [request])[f"q{number}"]
        assert event.token_ids == alone.token_ids


def test_features_are_encoded_once_for_all_arms_and_all_copies() -> None:
    encoder = tiny.encoder()
    base = random_request(3, max_tokens=3)
    num_images = len(encoder.engine.prepare(base).inputs.grids)
    assert num_images
    requests = [replace(base, request_id=f"{arm}-{copy}", arm=arm) for arm in ARMS for copy in range(2)]
    together = run(encoder, requests)
    assert encoder.engine.stats().num_images_encoded == 2 * num_images, "once by each encoder"
    for arm in ARMS:
        alone = run(tiny.encoder(), [replace(base, request_id="alone", arm=arm)])["alone"]
        assert together[f"{arm}-0"].token_ids == together[f"{arm}-1"].token_ids == alone.token_ids
        for mine, its in zip(together[f"{arm}-0"].fusion, alone.fusion, strict=True):
            assert mine.weights == pytest.approx(its.weights, abs=1e-6)


def test_a_bad_forward_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that were not finite once must not stay in the cache and fail the picture for ever."""
    encoder = tiny.encoder()
    qwen = encoder.model.model.encoders["qwen"]
    original = qwen.infer

    def poisoned(*args: object) -> object:
        found = original(*args)
        found.tokens.fill_(float("nan"))
        return found

    request = GenerationRequest(
        "p", (ChatMessage("user", (ImagePart(picture(random.Random(1))), TextPart("?"))),), SamplingParams(max_tokens=2)
    )
    monkeypatch.setattr(qwen, "infer", poisoned)
    assert isinstance(run(encoder, [request])["p"].error, RequestFailedError)
    monkeypatch.undo()
    assert run(encoder, [request])["p"].error is None


def test_scores_survive_chunks_and_cached_prefixes() -> None:
    base = random_request(5, max_tokens=20)
    answer = run(tiny.encoder(), [base])["r5"].token_ids
    scored = replace(base, request_id="s", score_token_ids=answer)
    expected = run(tiny.encoder(), [scored])["s"].score_logprobs
    assert len(expected) == 20
    chunked = tiny.encoder(engine_config=EngineConfig(max_num_seqs=4, max_num_batched_tokens=5))
    cached = tiny.encoder()
    run(cached, [base])
    for encoder in (chunked, cached):
        assert run(encoder, [scored])["s"].score_logprobs == pytest.approx(expected, abs=1e-5)


def test_priority_goes_first_and_a_late_request_ends_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(max_num_seqs=1))
    engine, now = encoder.engine, [100.0]
    monkeypatch.setattr(engine.runner, "clock", lambda: now[0])
    requests = [
        replace(random_request(number, max_tokens=3), priority=priority, timeout_seconds=timeout)
        for number, priority, timeout in ((0, 1, None), (1, 0, None), (2, 5, 30.0))
    ]
    for request in requests:
        engine.add_request(engine.prepare(request))
    ended = []
    while engine.has_work():
        for event in engine.step():
            if event.is_terminal:
                ended.append(event)
        now[0] += 9.0
    assert [event.request_id for event in ended] == ["r1", "r0", "r2"] or ended[-1].request_id == "r0"
    late = next(event for event in ended if event.request_id == "r2")
    assert isinstance(late.error, RequestFailedError)
    assert "30 s" in str(late.error)
    assert engine.runner.store.num_open == 0
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_pictures_wait_for_company_while_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(encode_window_seconds=1.0))
    engine, now = encoder.engine, [0.0]
    monkeypatch.setattr(engine.runner, "clock", lambda: now[0])
    message = ChatMessage("user", (ImagePart(picture(random.Random(3))), TextPart("?")))
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    for name in ("first", "second"):
        engine.add_request(engine.prepare(GenerationRequest(name, (message,), params)))
        engine.step()
    assert engine.stats().num_encoding == 1, "the first ran at once, the second waits"
    now[0] = 1.5
    engine.step()
    assert engine.stats().num_encoding == 0


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    encoder = tiny.encoder(engine_config=EngineConfig(max_context_tokens=64, kv_cache_bytes=cache_of(64)))
    message = ChatMessage("user", (TextPart("x" * 100),))
    with pytest.raises(ContextLengthError, match=r"1\d\d tokens .*63 tokens"):
        encoder.engine.prepare(GenerationRequest("big", (message,)))
    short = ChatMessage("user", (TextPart("x"),))
    event = run(encoder, [GenerationRequest("s", (short,), SamplingParams(max_tokens=500, ignore_eos=True))])["s"]
    assert event.finish_reason == "length"
    assert event.usage.prompt_tokens + event.usage.completion_tokens == 64


def test_settings_that_contradict_each_other_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=3, max_num_seqs=4"):
        EngineConfig(max_num_seqs=4, max_num_batched_tokens=3)
    shape = CacheShape(2, 2, 16, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"100 bytes, 0 tokens.*8192 bytes, 16 tokens"):
        EngineConfig(kv_cache_bytes=100, shrinks_context=True).num_blocks(shape, None, 2048)
    assert EngineConfig().num_blocks(shape, None, 160) == 16 * 10, "never more than all sequences could fill"


def test_a_cache_below_one_sequence_is_refused_with_both_numbers() -> None:
    """Unless nobody asked for either: then the context is what the cache holds, and says so."""
    shape = CacheShape(2, 2, 16, torch.device("cpu"), torch.float32)
    asked = 100 * shape.token_bytes
    with pytest.raises(ConfigError, match=rf"{asked} bytes, 96 tokens.*1048576 bytes, 2048 tokens.*max_context_tokens"):
        EngineConfig(kv_cache_bytes=asked).num_blocks(shape, None, 2048)
    assert EngineConfig(kv_cache_bytes=asked).num_blocks(shape, None, 96) == 6
    with pytest.raises(ConfigError, match=r"48 tokens.*96 tokens"):
        EngineConfig(kv_cache_bytes=asked).num_blocks(shape, None, 96, copies=2)
    assert EngineConfig(kv_cache_bytes=asked, shrinks_context=True).num_blocks(shape, None, 2048) == 6
    derived = 2**30 // shape.token_bytes
    assert EngineConfig().num_blocks(shape, None, 2**24) == derived // BLOCK_SIZE
    with pytest.raises(ConfigError, match=f"{derived} tokens.*{2**24} tokens"):
        EngineConfig(max_context_tokens=2**24).num_blocks(shape, None, 2**24)
    with pytest.raises(ConfigError, match=r"can't hold one sequence.*max_context_tokens"):
        tiny.encoder(engine_config=EngineConfig(kv_cache_bytes=cache_of(64)))
    with pytest.raises(ConfigError, match=r"more than the model's own.*4096.*up to 2048"):
        tiny.encoder(engine_config=EngineConfig(max_context_tokens=4096))


def test_a_budget_below_one_image_is_refused_with_both_numbers() -> None:
    smallest = tiny.encoder().format.patches.min_image_tokens
    tiny.encoder(engine_config=EngineConfig(max_encode_tokens=smallest))
    with pytest.raises(ConfigError, match=rf"max_encode_tokens={smallest - 1}.*at least {smallest}"):
        tiny.encoder(engine_config=EngineConfig(max_encode_tokens=smallest - 1))
    with pytest.raises(ConfigError, match=rf"max_visual_tokens={smallest - 1}.*at least {smallest}"):
        tiny.encoder().configure(ImageLimits(max_visual_tokens=smallest - 1))


@pytest.mark.parametrize(("variant_bytes", "left"), [(0, 1.0), (None, 7 / 8), (2**29, 0.5), (2**40, 0.0)])
def test_room_for_variants_is_kept_free_on_a_gpu(variant_bytes: int | None, left: float) -> None:
    shape = CacheShape(2, 2, 16, torch.device("cpu"), torch.float32)
    config = EngineConfig(variant_bytes=variant_bytes)
    most = int(2**30 * left * 0.85) // (shape.token_bytes * 16)
    if most:
        assert config.num_blocks(shape, 2**30, 2**30) == most
    else:
        with pytest.raises(ConfigError):
            config.num_blocks(shape, 2**30, 2**30)
