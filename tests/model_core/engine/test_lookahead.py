"""A step launched before the last one's tokens were read changes when the host waits, never what comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model_core.encoder import DualVisionEncoder
from model_core.engine.config import BLOCK_SIZE, EngineConfig
from model_core.engine.decode_graphs import DecodeGraphs
from model_core.engine.lookahead import Flight
from model_core.errors import RequestFailedError
from model_core.language.paged import PagedStore
from model_core.types import GenerationRequest, TokenEvent
from tests.model_core import tiny
from tests.model_core.engine.test_batching import SETTINGS as BATCHING
from tests.model_core.engine.test_engine import fold, random_request, run

PLAIN = EngineConfig(max_num_seqs=4)
SETTINGS = {
    "plain": PLAIN,
    "chunks of a few tokens": EngineConfig(max_num_seqs=4, max_num_batched_tokens=7),
    "no caches at all": EngineConfig(max_num_seqs=4, enable_prefix_caching=False, encoder_cache_bytes=0),
    "preemption": BATCHING["preemption"],
}


def flying(config: EngineConfig = PLAIN) -> DualVisionEncoder:
    return tiny.encoder(engine_config=replace(config, overlaps_steps=True))


class Log:
    """The order in which steps are launched and read. What is launched ahead gets its tokens from the device."""

    def __init__(self, encoder: DualVisionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[str] = []
        runner, read = encoder.engine.runner, Flight.read
        original = runner.run

        def launch(chunks: list, chosen: torch.Tensor | None = None) -> torch.Tensor:
            self.entries.append("launch" if chosen is None else "launch ahead")
            return original(chunks, chosen)

        def log_read(flight: Flight) -> list:
            self.entries.append("read")
            return read(flight)

        monkeypatch.setattr(runner, "run", launch)
        monkeypatch.setattr(Flight, "read", log_read)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each flight had that was launched behind another one."""
    sizes: list[int] = []
    launch = Flight.launch

    def count(chunks: list, logits: torch.Tensor) -> Flight:
        if not chunks[0].is_last:  # its token is not known yet
            sizes.append(len(chunks))
        return launch(chunks, logits)

    monkeypatch.setattr(Flight, "launch", count)
    return sizes


def equal(one: dict[str, TokenEvent], other: dict[str, TokenEvent]) -> None:
    for name, event in one.items():
        mine = other[name]
        assert (mine.token_ids, mine.text, mine.finish_reason) == (event.token_ids, event.text, event.finish_reason)
        assert mine.usage.completion_tokens == event.usage.completion_tokens


def is_all_free(encoder: DualVisionEncoder) -> bool:
    engine = encoder.engine
    blocks_free = engine.blocks.num_free == engine.blocks.num_blocks
    return blocks_free and engine.runner.store.num_open == 0 and not engine._ahead.is_flying


def test_the_next_step_is_launched_before_the_last_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = flying()
    log = Log(encoder, monkeypatch)
    run(encoder, [random_request(3, max_tokens=4)])
    assert log.entries == ["launch", *["launch ahead", "read"] * 3, "read"]


@pytest.mark.parametrize(("device", "is_on"), [("cpu", False), ("cuda", True), ("mps", False)])
def test_it_goes_by_the_device_unless_it_is_asked_for(device: str, is_on: bool) -> None:
    assert EngineConfig().overlaps_on(device) is is_on
    assert EngineConfig(overlaps_steps=not is_on).overlaps_on(device) is not is_on


@pytest.mark.parametrize(("name", "arrive"), [*((name, 3) for name in SETTINGS), ("plain", 1), ("preemption", 99)])
def test_tokens_and_text_are_those_without_it(name: str, arrive: int, ahead: list[int]) -> None:
    """Greedy rows that end by length, by an end token and by a stop string, and seeded ones among them."""
    rng = random.Random(arrive)
    requests = [random_request(number, max_tokens=rng.randint(1, 24)) for number in range(9)]
    requests[2] = random_request(2, max_tokens=30, ignore_eos=False, stop=("e", "#"))
    requests[4] = random_request(4, max_tokens=30, stop_token_ids=tuple(range(20, 84)))
    requests[6] = random_request(6, max_tokens=5, temperature=1.0, seed=7)
    requests[7] = random_request(7, max_tokens=6, logprobs=2, min_tokens=3)
    requests[8] = random_request(8, max_tokens=30)
    plain, encoder = tiny.encoder(engine_config=SETTINGS[name]), flying(SETTINGS[name])
    expected = run(plain, requests, arrive)
    without = len(ahead)
    equal(expected, run(encoder, requests, arrive))
    assert without == 0
    assert len(ahead) > 3, "this test must fly to mean something"
    assert is_all_free(encoder)
    if name == "preemption":
        assert encoder.engine.stats().num_preemptions > 0


def test_a_full_engine_flies_though_others_wait(ahead: list[int]) -> None:
    encoder = flying(EngineConfig(max_num_seqs=2))
    requests = [random_request(number, max_tokens=8) for number in range(7)]
    equal(run(tiny.encoder(engine_config=EngineConfig(max_num_seqs=2)), requests), run(encoder, requests))
    assert ahead.count(2) >= 3 * 6, "every pair but for its first step and its last, whoever waits for whatever"


def test_rows_that_need_the_host_keep_the_step_in_order(ahead: list[int]) -> None:
    special = ({"temperature": 1.0, "seed": 1}, {"logprobs": 0}, {"presence_penalty": 0.5}, {"logit_bias": {30: 1.0}})
    for sampling in special:
        requests = [random_request(0, max_tokens=4), random_request(1, max_tokens=4, **sampling)]
        run(flying(), requests)
        assert ahead == []


def test_over_paged_blocks_and_recorded_steps(ahead: list[int]) -> None:
    """What runs on a GPU, here without one: tokens go from one step to the next in the graphs' buffers."""
    config = SETTINGS["preemption"]
    encoder = flying(config)
    runner, decoder = encoder.engine.runner, encoder.engine.runner.decoder
    replays: list[int] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            replays.append(1)
            step()

        return replay

    runner.store = PagedStore(decoder.cache_shape, encoder.engine.blocks.num_blocks, BLOCK_SIZE)
    runner.graphs = DecodeGraphs(
        decoder, runner.store, max_num_seqs=6, max_context_tokens=2048, joined=decoder.joined, capture=capture
    )
    requests = [random_request(number, max_tokens=14) for number in range(8)]
    expected = run(tiny.encoder(engine_config=config), requests)
    for _ in range(2):  # the second time behind cached prefixes
        equal(expected, run(encoder, requests))
    assert len(replays) > len(ahead) > 10
    assert is_all_free(encoder)


def start(encoder: DualVisionEncoder, requests: list[GenerationRequest], steps: int) -> dict[str, TokenEvent]:
    engine, merged = encoder.engine, {r.request_id: TokenEvent(r.request_id) for r in requests}
    for request in requests:
        engine.add_request(engine.prepare(request))
    for _ in range(steps):
        turn(encoder, merged)
    assert engine._ahead.is_flying
    return merged


def turn(encoder: DualVisionEncoder, merged: dict[str, TokenEvent]) -> None:
    for event in encoder.engine.step():
        assert not merged[event.request_id].is_terminal
        merged[event.request_id] = fold(merged[event.request_id], event)


def finish(encoder: DualVisionEncoder, merged: dict[str, TokenEvent]) -> None:
    while encoder.engine.has_work():
        turn(encoder, merged)
    assert is_all_free(encoder)


def test_an_abort_in_flight_frees_at_once_and_leaves_the_others_as_they_were() -> None:
    requests = [random_request(number, max_tokens=12) for number in range(4)]
    undisturbed = run(tiny.encoder(engine_config=PLAIN), requests)
    encoder = flying()
    merged = start(encoder, requests, 4)
    num_free = encoder.engine.blocks.num_free
    encoder.engine.abort("r1")
    assert encoder.engine.blocks.num_free > num_free
    assert encoder.engine.runner.store.num_open == 3
    before = len(merged["r1"].token_ids)
    finish(encoder, merged)
    assert len(merged["r1"].token_ids) == before
    equal({name: undisturbed[name] for name in ("r0", "r2", "r3")}, merged)


def test_an_id_that_is_used_again_gets_nothing_of_the_one_that_was_aborted() -> None:
    first, second = random_request(1, max_tokens=9), replace(random_request(2, max_tokens=6), request_id="r1")
    expected = run(tiny.encoder(engine_config=PLAIN), [second])
    encoder = flying()
    start(encoder, [first], 3)
    encoder.engine.abort("r1")
    assert is_all_free(encoder), "the last one's flight goes with it"
    encoder.engine.add_request(encoder.engine.prepare(second))
    merged = {"r1": TokenEvent("r1")}
    finish(encoder, merged)
    equal(expected, merged)


def test_a_late_request_ends_in_flight_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, now = flying(), [0.0]
    monkeypatch.setattr(encoder.engine.runner, "clock", lambda: now[0])
    slow, other = replace(random_request(0, max_tokens=20), timeout_seconds=5.0), random_request(1, max_tokens=9)
    merged = start(encoder, [slow, other], 4)
    now[0] = 6.0
    turn(encoder, merged)
    assert isinstance(merged["r0"].error, RequestFailedError)
    finish(encoder, merged)
    equal(run(tiny.encoder(engine_config=PLAIN), [other]), {"r1": merged["r1"]})


def test_a_newcomer_joins_after_the_flight_and_changes_nobody() -> None:
    requests = [random_request(number, max_tokens=12) for number in range(3)]
    expected = run(tiny.encoder(engine_config=PLAIN), requests)
    encoder = flying()
    merged = start(encoder, requests[:2], 4) | {"r2": TokenEvent("r2")}
    encoder.engine.add_request(encoder.engine.prepare(requests[2]))
    turn(encoder, merged)
    assert not encoder.engine._ahead.is_flying, "it landed, so that the next step can be another"
    turn(encoder, merged)
    assert len(merged["r2"].token_ids) == 1
    finish(encoder, merged)
    equal(expected, merged)


def fail_when(
    encoder: DualVisionEncoder, is_bad: Callable[[list, bool], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """is_bad: of a step's chunks, and whether it is launched ahead."""
    original = encoder.engine.runner.run

    def fails(chunks: list, chosen: torch.Tensor | None = None) -> torch.Tensor:
        hidden = original(chunks, chosen)  # as far as the cache: a step that is run again must not see it
        if is_bad(chunks, chosen is not None):
            raise RuntimeError("out of memory, say")
        return hidden

    monkeypatch.setattr(encoder.engine.runner, "run", fails)


def test_a_launch_ahead_that_fails_comes_again_in_order(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [random_request(number, max_tokens=10) for number in range(4)]
    expected = run(tiny.encoder(engine_config=PLAIN), requests)
    encoder, turns = flying(), random.Random(0)
    fail_when(encoder, lambda chunks, is_ahead: is_ahead and turns.random() < 0.5, monkeypatch)
    equal(expected, run(encoder, requests))
    assert is_all_free(encoder)
    assert "a step could not be launched ahead: RuntimeError" in caplog.text


def test_what_does_not_fit_the_memory_at_its_end_comes_again_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing on the device fails now and then, keeping copies of full blocks whenever a step flies."""
    requests = [random_request(number, max_tokens=20) for number in range(4)]
    expected = run(tiny.encoder(engine_config=PLAIN), requests)
    encoder, turns, failed = flying(), random.Random(0), []

    def moody(what: str, inner: Callable) -> Callable:
        def call(*args: object) -> object:
            # A copy that fails in order is its row's own end, as without all this.
            if encoder.engine._ahead.is_flying if what == "keep" else turns.random() < 0.4:
                failed.append(what)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return inner(*args)

        return call

    monkeypatch.setattr(Flight, "launch", moody("launch", Flight.launch))
    monkeypatch.setattr(encoder.engine.runner.store, "keep", moody("keep", encoder.engine.runner.store.keep))
    equal(expected, run(encoder, requests))
    assert set(failed) == {"launch", "keep"}
    assert is_all_free(encoder)


def test_a_row_that_fails_every_step_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [random_request(number, max_tokens=10) for number in range(4)]
    undisturbed = run(tiny.encoder(engine_config=PLAIN), requests)
    encoder = flying()

    def is_bad(chunks: list, is_ahead: bool) -> bool:
        return any(c.sequence.request_id == "r2" and c.start == c.sequence.num_prompt + 2 for c in chunks)

    fail_when(encoder, is_bad, monkeypatch)
    merged = run(encoder, requests)
    assert isinstance(merged["r2"].error, RequestFailedError)
    assert merged["r2"].token_ids == undisturbed["r2"].token_ids[:3]
    equal({name: undisturbed[name] for name in ("r0", "r1", "r3")}, merged)
    assert is_all_free(encoder)


def test_a_row_whose_logits_are_not_finite_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [random_request(number, max_tokens=10) for number in range(3)]
    undisturbed = run(tiny.encoder(engine_config=PLAIN), requests)
    encoder, launch = flying(), Flight.launch

    def poison(chunks: list, logits: torch.Tensor) -> Flight:
        rows = [
            i for i, c in enumerate(chunks) if c.sequence.request_id == "r1" and c.start > c.sequence.num_prompt + 3
        ]
        logits[rows, 5] = float("nan")
        return launch(chunks, logits)

    monkeypatch.setattr(Flight, "launch", poison)
    merged = run(encoder, requests)
    assert "not finite" in str(merged["r1"].error)
    assert merged["r1"].token_ids == undisturbed["r1"].token_ids[:5]
    equal({name: undisturbed[name] for name in ("r0", "r2")}, merged)
    assert is_all_free(encoder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_tokens_land_in_pinned_memory_behind_their_own_event() -> None:
    logits = torch.randn(4, 50, device="cuda")
    logits[2, 3] = float("nan")
    flight = Flight.launch([None] * 4, logits)
    assert flight.landed is not None
    assert flight.copy.is_pinned()
    flight.landed.synchronize()
    tokens, sound = flight.copy.tolist()
    assert tokens == flight.tokens.tolist() == logits.max(dim=-1).indices.tolist()
    assert sound == [1, 1, 0, 1]
