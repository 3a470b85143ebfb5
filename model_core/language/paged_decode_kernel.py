"""Attention of one new token a sequence over paged keys and values, as Triton kernels.

In: queries, one layer's cache, and for each sequence its length and its block ids. Out: mixed values. It knows no
store and no step. Import it only where Triton is: with a CUDA build of torch, or under Triton's interpreter.

Flash-decoding (Dao et al., "Flash-Decoding for long-context inference", 2023): a sequence can be cut in parts that
are attended at the same time, each giving its own softmax and its log-sum, which a second kernel joins. All query
heads of one kv head stand in one tile, so that keys and values are read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

LOG2_E = 1.4426950408889634
# tl.dot takes no side shorter than this.
LEAST_TILE = 16
NUM_WARPS, NUM_STAGES = 4, 3
# For means of normal numbers in bfloat16.
TOLERANCE = 0.05


class Layout(NamedTuple):
    """What the kernels are compiled for. Strides and offsets count elements."""

    group: int  # query heads of one kv head
    padded_group: int
    kv_heads: int
    dim: int
    padded_dim: int
    block: int  # tokens of one cache block
    tile: int  # tokens of one turn of the loop
    splits: int  # a power of two
    scale: float  # of scores, for powers of two
    query_stride: int  # from one sequence's queries to the next
    token_stride: int  # from one token's keys to the next
    values_at: int  # from the keys to the values
    widens: bool  # compute products in float32 whatever the cache holds


@triton.jit
def _gather(cache, blocks, places, is_in, layout: tl.constexpr):
    """Keys and values (tile, padded_dim) of one kv head, zeros where `is_in` is false."""
    dims = tl.arange(0, layout.padded_dim)
    block = tl.load(blocks + places // layout.block, mask=is_in, other=0).to(tl.int64)
    slots = block * layout.block + places % layout.block
    where = slots[:, None] * layout.token_stride + dims[None, :]
    is_held = is_in[:, None] & (dims < layout.dim)[None, :]
    keys = tl.load(cache + where, mask=is_held, other=0.0)
    values = tl.load(cache + layout.values_at + where, mask=is_held, other=0.0)
    if layout.widens:
        keys = keys.to(tl.float32)
        values = values.to(tl.float32)
    return keys, values


@triton.jit(do_not_specialize=["row_stride"])
def _attend(query, cache, rows, row_stride, out, layout: tl.constexpr):
    """One sequence, one kv head, one part. `rows` has a sequence's length, then its block ids.

    With one part, `out` is the result (B, H, dim); else it holds every part's own result, then every part's log-sum.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(rows + row * row_stride)
    part = tl.cdiv(tl.cdiv(length, layout.splits), layout.tile) * layout.tile
    begin = split * part
    end = tl.minimum(begin + part, length)

    groups = tl.arange(0, layout.padded_group)
    dims = tl.arange(0, layout.padded_dim)
    is_dim = (dims < layout.dim)[None, :]
    is_real = (groups < layout.group)[:, None] & is_dim
    head = kv_head * layout.group + groups
    queries = query + row.to(tl.int64) * layout.query_stride + head[:, None] * layout.dim + dims[None, :]
    q = tl.load(queries, mask=is_real, other=0.0)
    if layout.widens:
        q = q.to(tl.float32)

    top = tl.full([layout.padded_group], float("-inf"), tl.float32)
    total = tl.full([layout.padded_group], 0.0, tl.float32)
    mixed = tl.full([layout.padded_group, layout.padded_dim], 0.0, tl.float32)
    for at in range(begin, end, layout.tile):
        place = at + tl.arange(0, layout.tile)
        is_in = place < end
        keys, values = _gather(cache + kv_head * layout.dim, rows + row * row_stride + 1, place, is_in, layout)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * layout.scale
        scores = tl.where(is_in[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = higher

    divisor = tl.where(total == 0.0, 1.0, total)  # an empty part; compared so that NaN stays NaN
    result = mixed / divisor[:, None]
    at_head = row * layout.kv_heads * layout.group + head
    if layout.splits == 1:
        tl.store(out + at_head[:, None] * layout.dim + dims[None, :], result, mask=is_real)
    else:
        log_sums = tl.num_programs(0) * layout.kv_heads * layout.group * layout.splits * layout.dim
        at_part = at_head * layout.splits + split
        tl.store(out + at_part[:, None] * layout.dim + dims[None, :], result, mask=is_real)
        log_sum = tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor))
        tl.store(out + log_sums + at_part, log_sum, mask=groups < layout.group)


@triton.jit
def _join(parts, out, layout: tl.constexpr):
    """One query head of one sequence: its parts' results, weighed by their sums."""
    head = tl.program_id(0)
    splits = tl.arange(0, layout.splits)
    dims = tl.arange(0, layout.padded_dim)
    is_dim = dims < layout.dim
    at_part = head * layout.splits + splits
    log_sums = tl.load(parts + tl.num_programs(0) * layout.splits * layout.dim + at_part)
    weights = tl.exp2(log_sums - tl.max(log_sums, 0))
    weights = weights / tl.sum(weights, 0)
    results = tl.load(parts + at_part[:, None] * layout.dim + dims[None, :], mask=is_dim[None, :], other=0.0)
    tl.store(out + head * layout.dim + dims, tl.sum(results * weights[:, None], 0), mask=is_dim)


def paged_decode(query: Tensor, cache: Tensor, rows: Tensor, *, block_size: int, splits: int) -> Tensor:
    """Attention of one query token a sequence over all tokens that it has in the cache.

    Args:
        query: (B, H, dh). cache: (P, 2, K, dh) contiguous, keys and values of P places; H is a multiple of K.
        rows: (B, 1 + W) int32: how many tokens a sequence has, one or more, then the ids of the blocks of
            `block_size` places that hold them. What stands behind the blocks it needs is not read.
        splits: parts that each sequence is cut into, a power of two.
    Returns:
        (B, H, dh) in the query's precision; sums are taken in float32.
    Raises:
        RuntimeError: the device can't run the kernels.
    """
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        query = query.contiguous()
    try:
        return _launch(query, cache, rows, _layout(query, cache, block_size, splits))
    except TritonError as error:
        raise RuntimeError(f"the Triton decode kernel does not run: {error}") from error


def _launch(query: Tensor, cache: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    batch, num_heads, dim = query.shape
    out = torch.empty(batch, num_heads, dim, device=query.device, dtype=query.dtype)
    grid = (batch, layout.kv_heads, layout.splits)
    if layout.splits == 1:
        _attend[grid](query, cache, rows, rows.stride(0), out, layout, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
        return out
    parts = torch.empty(batch * num_heads * layout.splits * (dim + 1), device=query.device, dtype=torch.float32)
    _attend[grid](query, cache, rows, rows.stride(0), parts, layout, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
    _join[(batch * num_heads,)](parts, out, layout, num_warps=NUM_WARPS)
    return out


def _layout(query: Tensor, cache: Tensor, block_size: int, splits: int) -> Layout:
    kv_heads, dim = cache.shape[2:]
    group = query.shape[1] // kv_heads
    padded_dim = max(LEAST_TILE, triton.next_power_of_2(dim))
    # So that two turns of keys and values fit the shared memory of cards that have 99 KiB of it.
    tile = 64 if cache.element_size() == 2 and padded_dim <= 128 else 32
    return Layout(
        group=group,
        padded_group=max(LEAST_TILE, triton.next_power_of_2(group)),
        kv_heads=kv_heads,
        dim=dim,
        padded_dim=padded_dim,
        block=block_size,
        tile=tile,
        splits=splits,
        scale=dim**-0.5 * LOG2_E,
        query_stride=query.stride(0),
        token_stride=2 * kv_heads * dim,
        values_at=kv_heads * dim,
        widens=query.device.type == "cpu",  # the interpreter keeps bfloat16 as integers and would multiply those
    )


def find_fault(cache: Tensor, block_size: int) -> str:
    """Tries the kernels on a cache (P, 2, K, dh), P some blocks, which it overwrites. Returns what is wrong, or
    nothing if all is well."""
    kv_heads, dim = cache.shape[2:]
    generator = torch.Generator(cache.device).manual_seed(0)
    cache.normal_(generator=generator)
    query = torch.randn(2, 2 * kv_heads, dim, generator=generator, device=cache.device).to(cache.dtype)
    blocks = torch.arange(cache.shape[0] // block_size, device=cache.device).flip(0)
    length = (len(blocks) - 1) * block_size + 1
    rows = torch.stack([torch.cat([blocks.new_tensor([n]), blocks]) for n in (length, 1)]).int()
    places = (blocks[:, None] * block_size + torch.arange(block_size, device=cache.device)).flatten()[:length]
    keys, values = cache[places].float().repeat_interleave(2, dim=2).unbind(1)  # (T, H, dh)
    scores = torch.einsum("hd,thd->ht", query[0].float(), keys) * dim**-0.5
    expected = torch.stack([torch.einsum("ht,thd->hd", scores.softmax(-1), values), values[0]])
    for splits in (1, 4):
        try:
            found = paged_decode(query, cache, rows, block_size=block_size, splits=splits)
            error = float((found.float() - expected).abs().max())
        except RuntimeError as failure:
            return str(failure)
        if not error < TOLERANCE:
            return f"results are off by {error:.3g}"
    return ""
