"""Which attention over packed sequences there is, and that torch's own is called for what it means."""

from __future__ import annotations

import contextlib
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torchs

from model_core.language import varlen
from model_core.language.kv_cache import attend_chunk, chunk_mask
from model_core.language.paged import PagedStore
from model_core.language.varlen import bounds_of, find_fault, find_flash, find_torch, torch_varlen
from tests.model_core.language.test_kv_cache import BLOCK, SHAPE
from tests.model_core.language.test_paged import PagedBench
from tests.model_core.language.test_paged import varlen as reference

SHORT = replace(SHAPE, dtype=torch.bfloat16)


def grouped(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, context_bounds: Tensor, longest: int, most: int,
    *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's function on a CPU, with its checks."""
    assert window_size == (-1, 0)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return reference(query, key, value, bounds, context_bounds, longest, most, causal=True)


def ungrouped(*args: Tensor | int, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """That of a torch which takes no groups."""
    return grouped(*args, window_size=window_size)


def from_the_start(*args: Tensor | int, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
    """A kernel that counts causality from the beginning: right for prompts, wrong for chunks with a past."""
    query, key, value, bounds, context_bounds = args[:5]
    lengths, contexts = bounds.diff().tolist(), context_bounds.diff().tolist()
    parts = zip(query.split(lengths), key.split(contexts), value.split(contexts), strict=True)
    return torch.cat(
        [
            attend_chunk(q, k[: len(q)].transpose(0, 1), v[: len(q)].transpose(0, 1), chunk_mask(0, len(q), q.device))
            for q, k, v in parts
        ]
    )


@pytest.mark.parametrize("theirs", [grouped, ungrouped])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_torchs_own_means_the_same_as_flash_attns(
    theirs: object, has_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchs, "varlen_attn", theirs)
    lengths, contexts = (1, 4, 7), (6, 4, 30)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(12, 6, 8, generator=generator)
    keys, values = torch.randn(2, 40, 2, 8, generator=generator)
    rest = (torch.from_numpy(bounds_of(lengths)), torch.from_numpy(bounds_of(contexts)), 7, 30)
    with contextlib.nullcontext() if has_gradients else torch.no_grad():
        found = torch_varlen()(query, keys, values, *rest, causal=True)
    assert torch.allclose(found, reference(query, keys, values, *rest, causal=True), atol=1e-6)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_the_torch_that_is_installed_takes_these_arguments(has_gradients: bool) -> None:
    """As far as a tensor without content goes: the kernel itself is CUDA's."""
    query, keys, values = (torch.empty(12, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (6, 2, 2))
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    with contextlib.nullcontext() if has_gradients else torch.no_grad():
        found = torch_varlen()(query, keys, values, bounds, bounds, 7, 30, causal=True)
    assert found.shape == query.shape


def test_a_store_takes_its_chunks_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchs, "varlen_attn", grouped)
    attention, why_not = find_torch(SHORT)
    assert why_not == ""
    bench = PagedBench(0, varlen=attention, varlen_name="torch-varlen")
    assert bench.paged.name == "paged+sdpa+torch-varlen"
    with torch.inference_mode():
        for key in "abc":
            bench.open(key)
        bench.go({"a": 9, "b": 4})  # both new
        bench.go({"a": 1, "b": 3, "c": 12})  # a decode, a chunk with a past, a new one
        bench.go({"b": 1, "a": 5, "c": 2})


def test_the_trial_refuses_a_kernel_that_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchs, "varlen_attn", from_the_start)
    attention, why_not = find_torch(SHORT)
    assert attention is None
    assert "results are off by" in why_not


def test_the_trial_says_what_a_kernel_raised_and_does_not_take_nan_for_right() -> None:
    def fails(*args: object, causal: bool) -> Tensor:
        raise RuntimeError("no kernel image")

    assert find_fault(fails, SHORT) == "no kernel image"
    assert "results are off by nan" in find_fault(lambda q, *args, causal: q * float("nan"), SHORT)


def test_it_is_for_sixteen_bits_and_for_cards_that_have_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not float32" in find_torch(SHAPE)[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    on_turing = find_torch(replace(SHORT, device=torch.device("cuda")))
    assert on_turing == (None, "compute capability 7.5 is below 8.0")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert find_torch(SHORT) == (None, "this torch has none")


def test_flash_attention_is_for_sixteen_bits_and_for_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_flash(SHAPE)[0] is None
    assert "not float32" in find_flash(SHAPE)[1]
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert find_flash(SHORT)[0] is None
    assert find_flash(SHORT, is_wanted=False) == (None, "it is not installed")
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = reference
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert find_flash(SHORT) == (reference, "")
    monkeypatch.setattr(varlen, "find_spec", lambda name: object())
    assert find_flash(SHORT, is_wanted=False) == (None, "it was not asked for")
    assert PagedStore(SHORT, 4, BLOCK, varlen=reference).name == "paged+sdpa+flash-attn"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_torchs_own_passes_its_trial_on_a_gpu() -> None:
    shape = replace(SHORT, device=torch.device("cuda"), head_dim=128)
    assert find_torch(shape)[1] == ""
