"""Out of memory: a batch is split and tried again, and a row that fits nowhere ends alone, by its own name."""

from __future__ import annotations

import pytest
import torch

from model_core.engine import engine as engine_module
from model_core.engine.config import BLOCK_SIZE, EngineConfig
from model_core.errors import OutOfDeviceMemoryError
from model_core.types import ChatMessage, GenerationRequest, SamplingParams, TextPart
from tests.model_core import tiny
from tests.model_core.engine.test_engine import random_request, run

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


def failing(inner, is_too_much, error: Exception):
    def call(work, *chosen):
        if is_too_much(work):
            raise error
        return inner(work, *chosen)

    return call


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_batch_that_does_not_fit_is_split_and_nobody_notices(monkeypatch, error: Exception) -> None:
    encoder = tiny.encoder()
    requests = [random_request(n) for n in range(6)]
    alone = {r.request_id: run(encoder, [r])[r.request_id] for r in requests}
    encoder.engine.reset_caches()
    runner, tried = encoder.engine.runner, []

    def more_than_two(work) -> bool:
        tried.append(len(work))
        return len(work) > 2

    monkeypatch.setattr(runner, "run", failing(runner.run, more_than_two, error))
    monkeypatch.setattr(runner, "encode", failing(runner.encode, more_than_two, error))
    found = run(encoder, requests)
    assert {n: e.token_ids for n, e in found.items()} == {n: e.token_ids for n, e in alone.items()}
    assert max(tried) > 2, "the larger batches were tried"


@pytest.mark.parametrize("stage", ["run", "encode"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_row_that_fits_nowhere_ends_alone(monkeypatch, stage: str, error: Exception) -> None:
    encoder = tiny.encoder()
    requests = [random_request(n) for n in range(4)]
    runner = encoder.engine.runner

    def has_large(work) -> bool:
        return any(getattr(one, "sequence", one).request_id == "r2" for one in work)

    monkeypatch.setattr(runner, stage, failing(getattr(runner, stage), has_large, error))
    found = run(encoder, requests)
    assert type(found["r2"].error) is OutOfDeviceMemoryError
    assert [e.finish_reason for n, e in found.items() if n != "r2"] == ["length"] * 3
    assert not encoder.engine.has_work()


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_sampling_that_does_not_fit_is_split_and_nobody_notices(monkeypatch, error: Exception) -> None:
    encoder, tried = tiny.encoder(), []
    requests = [random_request(n) for n in range(6)]
    alone = {r.request_id: run(encoder, [r])[r.request_id].token_ids for r in requests}
    sample = engine_module.sample_batch

    def limited(logits: torch.Tensor, states: list) -> list:
        tried.append(len(states))
        if len(states) > 2:
            raise error
        return sample(logits, states)

    monkeypatch.setattr(engine_module, "sample_batch", limited)
    assert {n: e.token_ids for n, e in run(encoder, requests).items()} == alone
    assert max(tried) > 2, "the larger batches were tried"


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_block_that_can_not_be_kept_is_named_for_nobody(monkeypatch, error: Exception) -> None:
    """Its row ends alone, and whoever asks the same next computes it anew."""
    encoder = tiny.encoder()
    requests, store = [random_request(n) for n in range(4)], encoder.engine.runner.store
    alone = {r.request_id: run(encoder, [r])[r.request_id].token_ids for r in requests}
    encoder.engine.reset_caches()
    keep = store.keep

    def limited(key, first: int, blocks) -> None:
        if key.request_id == "r2":
            raise error
        keep(key, first, blocks)

    monkeypatch.setattr(store, "keep", limited)
    found = run(encoder, requests)
    assert type(found["r2"].error) is OutOfDeviceMemoryError
    assert {n: e.token_ids for n, e in found.items() if n != "r2"} == {n: t for n, t in alone.items() if n != "r2"}
    monkeypatch.undo()
    hits = encoder.engine.stats().prefix_cache_hits
    again = run(encoder, [requests[2]])["r2"]
    assert again.token_ids == alone["r2"]
    assert encoder.engine.stats().prefix_cache_hits == hits + BLOCK_SIZE, (
        "what every prompt begins with: others kept it"
    )


def test_rows_on_a_cpu_stay_within_the_cache_that_was_asked_for() -> None:
    """All rows are as long as the longest: one long request beside many short ones must not take many long rows."""
    shape = tiny.encoder().engine.runner.decoder.cache_shape
    asked = 2 * 1024 * shape.token_bytes
    encoder = tiny.encoder(engine_config=EngineConfig(max_context_tokens=1024, kv_cache_bytes=asked))
    store, sizes = encoder.engine.runner.store, []
    reserve = store._reserve

    def watched(rows: int, length: int) -> None:
        reserve(rows, length)
        sizes.append(store.num_bytes + store._kept.nbytes)

    store._reserve = watched
    long = ChatMessage("user", (TextPart("a" * 800),))
    requests = [random_request(n, max_tokens=40) for n in range(12)]
    requests.insert(6, GenerationRequest("long", (long,), SamplingParams(max_tokens=60, ignore_eos=True)))
    together = run(encoder, requests, 3)
    assert max(sizes) <= asked
    assert encoder.engine.cache_bytes == asked + encoder.engine.config.encoder_cache_bytes
    roomy = tiny.encoder()
    assert {n: e.token_ids for n, e in together.items()} == {n: e.token_ids for n, e in run(roomy, requests).items()}
