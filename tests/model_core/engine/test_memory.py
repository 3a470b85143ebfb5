"""Out of memory: a batch is split and tried again, and a row that fits nowhere ends alone, by its own name."""

from __future__ import annotations

import pytest
import torch

from model_core.errors import OutOfDeviceMemoryError
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
