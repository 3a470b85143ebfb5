"""The paged store answers what plain attention would, whatever blocks it is given and whatever lay in them before."""

from __future__ import annotations

import random
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from model_core.engine.block_manager import BlockManager
from model_core.engine.config import EngineConfig
from model_core.errors import ConfigError
from model_core.language import paged
from model_core.language.kv_cache import CacheShape, RowStore, Work, attend_chunk, chunk_mask
from model_core.language.paged import MAX_SPLITS, DecodeRows, PagedStore, build_store, num_splits, upload
from tests.model_core import tiny
from tests.model_core.engine.test_engine import random_request, run
from tests.model_core.language.test_kv_cache import BLOCK, HEADS, SHAPE, Bench

CPU = torch.device("cpu")


def varlen(query: Tensor, keys: Tensor, values: Tensor, *args: object, causal: bool) -> Tensor:
    """flash_attn_varlen_func's contract: causal from the end of each sequence."""
    bounds, context_bounds, longest, longest_context = args
    assert causal
    assert bounds.dtype == context_bounds.dtype == torch.int32
    lengths, contexts = bounds.diff().tolist(), context_bounds.diff().tolist()
    assert (max(lengths), max(contexts)) == (longest, longest_context)
    assert keys.shape[0] == values.shape[0] == sum(contexts)
    parts = zip(query.split(lengths), keys.split(contexts), values.split(contexts), strict=True)
    out = []
    for q, k, v in parts:
        mask = chunk_mask(len(k) - len(q), len(q), CPU)
        out.append(attend_chunk(q, k.transpose(0, 1), v.transpose(0, 1), mask))
    return torch.cat(out)


class PagedBench(Bench):
    """Gives each sequence blocks of a small pool, in which places that nobody wrote hold NaN."""

    def __init__(self, seed: int, *, num_blocks: int = 200, **settings: object) -> None:
        self.paged = PagedStore(SHAPE, num_blocks, BLOCK, **settings)
        super().__init__(self.paged, seed)
        self.paged._pool.fill_(float("nan"))
        self.blocks = BlockManager(num_blocks, BLOCK)
        self.owned: dict[str, list[int]] = {}

    def open(self, key: str, cached: list[int] | None = None, tokens: list | None = None) -> None:
        super().open(key, cached, tokens)
        self.owned[key] = []

    def close(self, key: str) -> None:
        super().close(key)
        for block in self.owned[key]:  # as if the one who leaves had gone wrong
            self.paged._pool[:, block * BLOCK : (block + 1) * BLOCK] = float("nan")
        self.blocks.free(self.owned.pop(key))

    def give(self, wanted: dict[str, int]) -> None:
        for key, count in wanted.items():
            assert self.blocks.allocate(self.owned[key], self.length(key) + count)

    def go(self, wanted: dict[str, int]) -> None:
        self.give(wanted)
        self.step(wanted, self.owned)


@pytest.mark.parametrize("backend", [None, varlen], ids=["sdpa", "varlen"])
@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_work_equals_plain_attention(seed: int, backend: object) -> None:
    rng = random.Random(seed)
    bench = PagedBench(seed, varlen=backend)
    for number in range(40):
        if len(bench.plain) < 5 and rng.random() < 0.5:
            bench.open(f"s{number}")
        if bench.plain and rng.random() < 0.2:
            bench.close(rng.choice(list(bench.plain)))
        members = [key for key in bench.plain if rng.random() < 0.8]
        wanted = {key: 1 if bench.length(key) and rng.random() < 0.7 else rng.choice([1, 2, 7, 30]) for key in members}
        if wanted:
            bench.go(wanted)
        assert bench.paged.num_open == len(bench.plain)


def test_a_repeated_step_writes_the_same_places() -> None:
    """A step that failed half-way is run again, in parts."""
    bench = PagedBench(0)
    bench.open("a")
    bench.open("b")
    bench.go({"a": 3, "b": 5})
    bench.give({"a": 1, "b": 1})
    bench.paged.begin([Work("a", 3, 1, bench.owned["a"]), Work("b", 5, 1, bench.owned["b"])])
    bench.go({"a": 1})
    bench.go({"b": 1})
    bench.go({"a": 2, "b": 1})


def test_a_shared_prefix_is_read_where_it_lies() -> None:
    bench = PagedBench(1)
    bench.open("first")
    bench.go({"first": 2 * BLOCK + 3})
    shared = bench.owned["first"][:2]
    tokens = [list(layer[: 2 * BLOCK]) for layer in bench.plain["first"]]
    bench.open("second", shared, tokens)
    assert bench.blocks.allocate(bench.owned["second"], 2 * BLOCK + 5, shared)
    bench.step({"first": 1, "second": 5}, bench.owned)
    bench.go({"second": 1, "first": 1})
    bench.paged.keep("second", 2, bench.owned["second"][2:])  # no copy: nothing to see
    bench.go({"second": 1, "first": 9})


def test_a_sequence_that_comes_back_may_have_other_blocks() -> None:
    bench = PagedBench(2, num_blocks=8)
    bench.open("a")
    bench.go({"a": 10})
    first = list(bench.owned["a"])
    bench.close("a")
    bench.open("other")
    bench.go({"other": 2})
    bench.open("a")
    bench.go({"a": 9, "other": 1})
    assert bench.owned["a"] != first
    bench.go({"a": 1, "other": 1})


@pytest.mark.parametrize("width", [0, 3])
def test_a_static_step_equals_a_usual_one_and_reads_nothing_behind_the_lengths(width: int) -> None:
    bench = PagedBench(3)
    for key, count in (("a", 9), ("b", 1), ("c", 4)):
        bench.open(key)
        bench.go({key: count})
    bench.give(dict.fromkeys("abc", 1))
    work = [Work(key, bench.length(key), 1, bench.owned[key]) for key in "abc"]
    query = torch.randn(3, HEADS, SHAPE.head_dim, generator=bench.generator)
    key, value = torch.randn(2, 3, SHAPE.num_kv_heads, SHAPE.head_dim, generator=bench.generator)
    expected = bench.paged.begin(work)(1, query, key, value)
    slots, rows = bench.paged.pack_decode(work)
    assert slots.dtype == rows.dtype == np.int32
    assert rows[:, 0].tolist() == [10, 2, 5]
    stale = np.full((3, width), 150, dtype=np.int32)
    inputs = DecodeRows(*upload([slots, np.concatenate([rows, stale], axis=1)], CPU))
    assert torch.allclose(bench.paged.attend_static(inputs)(1, query, key, value), expected, atol=1e-6)


def test_one_upload_carries_all_parts_each_at_a_multiple_of_sixteen_bytes() -> None:
    parts = [np.arange(n, dtype=np.int32).reshape(shape) for n, shape in ((5, 5), (6, (2, 3)), (1, 1), (8, (2, 4)))]
    moved = upload(parts, CPU)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
    for part, tensor in zip(parts, moved, strict=True):
        assert tensor.tolist() == part.tolist()
        assert tensor.storage_offset() % 4 == 0


@pytest.mark.parametrize(
    ("pairs", "processors", "expected"), [(2, 132, 64), (4, 132, 64), (64, 132, 4), (256, 132, 1), (1, 1, 2), (9, 8, 1)]
)
def test_few_pairs_are_split_until_the_device_is_full_twice(pairs: int, processors: int, expected: int) -> None:
    assert num_splits(pairs, processors) == expected <= MAX_SPLITS


def test_what_stands_in_for_a_mask_on_cuda_means_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 4, 8, generator=generator)
    keys, values = torch.randn(2, 2, 12, 8, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a CPU has no flash kernel
        found = attend_chunk(query, keys, values, causal_lower_right(5, 12))
    assert torch.allclose(found, attend_chunk(query, keys, values, chunk_mask(7, 5, CPU)), atol=1e-6)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown decode backend.*cublas.*triton, sdpa"):
        PagedStore(SHAPE, 4, BLOCK, backend="cublas")


def test_triton_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_core.language.paged_decode_kernel", None)
    with pytest.raises(ConfigError, match="can't be imported"):
        PagedStore(SHAPE, 4, BLOCK, backend="triton")
    assert paged._triton_fault(SHAPE, BLOCK)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_cpu_gets_dense_rows(enable_prefix_caching: bool) -> None:
    store, reason = build_store(SHAPE, 8, BLOCK, use_flash_attention=True, enable_prefix_caching=enable_prefix_caching)
    assert isinstance(store, RowStore)
    assert reason == "rows+sdpa: dense rows, as the device is cpu"
    assert (store._kept is not None) == enable_prefix_caching


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> CacheShape:
    """The choice is made for CUDA, the tensors are made here."""
    monkeypatch.setattr(paged, "_triton_fault", lambda *args: "no such luck")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(paged, "PagedStore", lambda asked, *args, **kw: PagedStore(SHAPE, *args, **kw))
    return replace(SHAPE, device=torch.device("cuda"), dtype=torch.bfloat16)


def test_a_gpu_gets_the_triton_decode_where_it_passes_its_trial(
    gpu: CacheShape, triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "_triton_fault", lambda *args: "")
    monkeypatch.setattr(paged, "find_flash", lambda *args, **kw: (varlen, ""))
    store, reason = paged.build_store(gpu, 8, BLOCK, use_flash_attention=True)
    assert store.name == "paged+triton+flash-attn"
    assert reason == "paged+triton+flash-attn: the device is a GPU"


@pytest.mark.parametrize(
    ("flash", "own", "name", "because"),
    [
        ("", "never asked", "flash-attn", ""),
        ("not there", "", "torch-varlen", "; no flash-attn: not there"),
        ("not there", "too old", "sdpa", "; no flash-attn: not there; no varlen of torch: too old"),
    ],
)
def test_a_gpu_gets_the_best_attention_for_chunks_that_runs_there(
    flash: str, own: str, name: str, because: str, gpu: CacheShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "find_flash", lambda *args, **kw: (None if flash else varlen, flash))
    monkeypatch.setattr(paged, "find_torch", lambda *args: (None if own else varlen, own))
    store, reason = paged.build_store(gpu, 8, BLOCK, use_flash_attention=True)
    assert store.name == f"paged+sdpa+{name}"
    assert reason == f"paged+sdpa+{name}: the device is a GPU; no Triton decode: no such luck{because}"


@pytest.mark.parametrize("num_tokens", [0, 160])
def test_an_engine_over_it_gives_the_tokens_of_one_over_dense_rows(num_tokens: int) -> None:
    """With 160 tokens of cache sequences are preempted, and blocks change hands all the time."""
    token_bytes = tiny.encoder().engine.runner.decoder.cache_shape.token_bytes
    config = EngineConfig(
        max_num_seqs=6,
        max_num_batched_tokens=64,
        max_context_tokens=num_tokens or None,
        kv_cache_bytes=2 * num_tokens * token_bytes or None,
    )
    requests = [random_request(number, max_tokens=12) for number in range(8)]
    expected = run(tiny.encoder(engine_config=config), requests)
    encoder = tiny.encoder(engine_config=config)
    engine = encoder.engine
    engine.runner.store = PagedStore(engine.runner.decoder.cache_shape, engine.blocks.num_blocks, varlen=varlen)
    for _ in range(2):  # the second time behind cached prefixes
        found = run(encoder, requests)
        for request in requests:
            assert found[request.request_id].error is None
            assert found[request.request_id].token_ids == expected[request.request_id].token_ids
        assert engine.runner.store.num_open == 0
    assert (engine.stats().num_preemptions > 0) == bool(num_tokens)
    assert engine.stats().prefix_cache_hits > 0
