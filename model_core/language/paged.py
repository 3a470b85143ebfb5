"""The KV store of GPUs: a pool of blocks in which a block id is a place, so that a shared prefix is never copied.

A step uploads all its indices once; attention then runs for all single tokens together (Triton, or SDPA over gathered
blocks) and for all chunks together (flash-attn's kernel or torch's, `varlen.py`) or one by one (SDPA). `build_store`
chooses what the device can do. It knows no scheduler and owns no block: ids come with the work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from model_core.errors import ConfigError
from model_core.language.kv_cache import (
    Attend,
    CacheShape,
    KVStore,
    RowStore,
    Work,
    attend_chunk,
    attend_padded,
    chunk_mask,
)
from model_core.language.varlen import FLASH_DTYPES, VarlenAttention, bounds_of, find_flash, find_torch

DECODE_BACKENDS = ("triton", "sdpa")
MAX_SPLITS = 64
TRIAL_BLOCKS = 20  # more than one turn of the kernel's loop, in each of its parts
#: What a CPU counts as; only Triton's interpreter asks.
CPU_PROCESSORS = 1

#: (query (N, H, dh), key (N, K, dh), value (N, K, dh), cache (P, 2, K, dh)) -> (N, H, dh)
Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One new token for each of B sequences, on the device.

    slots: (B,) int32, the place where each new token's keys and values go.
    rows: (B, 1 + W) int32, the tokens to attend to, the new one included, then the ids of the blocks that hold them.
        What stands behind the ids that are needed may be anything that is a block id.
    """

    slots: Tensor
    rows: Tensor


class PagedStore(KVStore):
    """Blocks of `block_size` tokens; the place of a token is its block's id times `block_size`, plus its offset.

    backend: who attends for single tokens, of `DECODE_BACKENDS`. varlen: who attends for chunks, `varlen_name` in the
    log; without it SDPA takes them one by one. The pool has one block more than asked for, `scratch_block`, which
    belongs to nobody: padded rows of a recorded step write there.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_blocks: int,
        block_size: int = 16,
        *,
        backend: str = "sdpa",
        varlen: VarlenAttention | None = None,
        varlen_name: str = "flash-attn",
    ) -> None:
        """Raises ConfigError: the backend is unknown, or its package is not installed."""
        self.shape, self.num_blocks, self.block_size, self.backend = shape, num_blocks, block_size, backend
        self.scratch_block = num_blocks
        self.name = f"paged+{backend}+{varlen_name if varlen else 'sdpa'}"
        self._plan_decode = self._decode_planner(backend)
        self._varlen = varlen
        self._tables: dict[Hashable, _Table] = {}
        size = (shape.num_layers, (num_blocks + 1) * block_size, 2, shape.num_kv_heads, shape.head_dim)
        self._pool = torch.empty(size, device=shape.device, dtype=shape.dtype)  # no place is read before it is written
        self._caches = list(self._pool.unbind())  # L of (P, 2, K, dh), a token's values behind its keys
        is_cuda = shape.device.type == "cuda"
        self._processors = (
            torch.cuda.get_device_properties(shape.device).multi_processor_count if is_cuda else CPU_PROCESSORS
        )

    def __contains__(self, key: object) -> bool:
        return key in self._tables

    @property
    def num_open(self) -> int:
        return len(self._tables)

    @property
    def num_bytes(self) -> int:
        return self._pool.nbytes

    def open(self, key: Hashable, cached: Sequence[int] = ()) -> None:
        """`cached` is not needed: the work names all blocks. While a sequence is open its blocks only grow."""
        del cached
        self._tables[key] = _Table()

    def close(self, key: Hashable) -> None:
        self._tables.pop(key, None)

    def keep(self, key: Hashable, first: int, blocks: Sequence[int]) -> None:
        """Nothing to do: full blocks stay where they are until their ids are given to somebody else."""

    def begin(self, work: Sequence[Work]) -> Attend:
        singles = next((i for i, w in enumerate(work) if w.length != 1), len(work))
        decode, chunks = work[:singles], work[singles:]
        tables = [self._ids(w) for w in work]
        parts = [np.concatenate([self._slots(w, ids) for w, ids in zip(work, tables, strict=True)])]
        if decode:
            parts.append(_as_rows(decode, tables[:singles]))
        if self._varlen and chunks:
            plan_chunks = self._plan_varlen(chunks, tables[singles:], parts)
        else:
            plan_chunks = self._plan_one_by_one(chunks, tables[singles:], parts)
        moved = upload(parts, self.shape.device)
        planned: list[tuple[slice, Mix]] = []
        if decode:
            mix = self._plan_decode(moved[1], max(w.start for w in decode) + 1)
            planned.append((slice(0, singles), mix))
        if chunks:
            planned.append((slice(singles, None), plan_chunks(moved)))
        return self._attend(moved[0].long(), planned)

    def attend_static(self, inputs: DecodeRows) -> Attend:
        """Attention over single tokens whose indices lie in buffers that stay.

        Nothing of their content is read by the host, so a forward that uses the result can be recorded once and
        launched again after the buffers were filled anew. Call it inside what is recorded.
        """
        mix = self._plan_decode(inputs.rows, None)
        return self._attend(inputs.slots.long(), [(slice(None), mix)])

    def pack_decode(self, work: Sequence[Work]) -> tuple[np.ndarray, np.ndarray]:
        """What `DecodeRows` holds for this single-token work: slots (B,) and rows (B, 1 + W), int32 on the host."""
        tables = [self._ids(w) for w in work]
        slots = np.concatenate([self._slots(w, ids) for w, ids in zip(work, tables, strict=True)])
        return slots, _as_rows(work, tables)

    def _ids(self, work: Work) -> np.ndarray:
        """The blocks that hold this work's sequence up to the work's end."""
        return self._tables[work.key].first(-(-(work.start + work.length) // self.block_size), work.blocks)

    def _slots(self, work: Work, ids: np.ndarray) -> np.ndarray:
        places = np.arange(work.start, work.start + work.length, dtype=np.int32)
        return ids[places // self.block_size] * self.block_size + places % self.block_size

    def _context(self, work: Work, ids: np.ndarray) -> np.ndarray:
        """The places of all tokens up to the work's end."""
        offsets = np.arange(self.block_size, dtype=np.int32)
        return (ids[:, None] * self.block_size + offsets).ravel()[: work.start + work.length]

    def _attend(self, slots: Tensor, planned: list[tuple[slice, Mix]]) -> Attend:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = self._caches[layer]
            cache[:, 0].index_copy_(0, slots, key)
            cache[:, 1].index_copy_(0, slots, value)
            parts = [mix(query[at], key[at], value[at], cache) for at, mix in planned]
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

        return attend

    # Single tokens

    def _decode_planner(self, backend: str) -> Callable[[Tensor, int | None], Mix]:
        if backend == "sdpa":
            return self._plan_sdpa
        if backend != "triton":
            raise ConfigError("unknown decode backend", value=backend, allowed=", ".join(DECODE_BACKENDS))
        try:
            from model_core.language.paged_decode_kernel import paged_decode  # noqa: PLC0415  Triton is not everywhere
        except ImportError as error:
            raise ConfigError(
                "the Triton decode kernel can't be imported",
                value=str(error),
                allowed="backend 'sdpa' without Triton",
                fix="Install triton, which comes with CUDA builds of torch",
            ) from error

        def plan(rows: Tensor, longest: int | None) -> Mix:
            del longest  # each program of the kernel reads its own length
            splits = num_splits(rows.shape[0] * self.shape.num_kv_heads, self._processors)

            def mix(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
                del key, value  # already in the cache
                return paged_decode(query, cache, rows, block_size=self.block_size, splits=splits)

            return mix

        return plan

    def _plan_sdpa(self, rows: Tensor, longest: int | None) -> Mix:
        """`longest` tokens are gathered for everybody; None: as many as the block ids have room for."""
        lengths, offsets = rows[:, 0], torch.arange(self.block_size, device=rows.device)
        places = (rows[:, 1:, None] * self.block_size + offsets).flatten(1)[:, :longest]  # (B, T)
        is_held = torch.arange(places.shape[1], device=rows.device) < lengths[:, None]
        # The mask alone would not do: a place that another sequence left may hold NaN, and 0 * NaN is NaN.
        places = torch.where(is_held, places, places[:, :1])

        def mix(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
            del key, value  # already in the cache
            keys, values = cache[places].permute(2, 0, 3, 1, 4)  # (B, K, T, dh)
            return attend_padded(query, keys, values, lengths)

        return mix

    # Chunks: the planners add what they need to the step's upload, and then take it from there

    def _plan_one_by_one(
        self, chunks: Sequence[Work], tables: Sequence[np.ndarray], parts: list[np.ndarray]
    ) -> Callable[[list[Tensor]], Mix]:
        """A prompt's first chunk reads what it has just computed; a later one gathers its context."""
        masks, at_part = [], []
        for w, ids in zip(chunks, tables, strict=True):
            masks.append(_mask(w.start, w.length, self.shape))
            at_part.append(len(parts) if w.start else None)
            if w.start:
                parts.append(self._context(w, ids))

        def plan(moved: list[Tensor]) -> Mix:
            contexts = [None if at is None else moved[at] for at in at_part]

            def mix(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
                out, at = [], 0
                for w, mask, context in zip(chunks, masks, contexts, strict=True):
                    here = slice(at, at + w.length)
                    keys, values = (key[here], value[here]) if context is None else cache[context].unbind(1)
                    out.append(attend_chunk(query[here], keys.transpose(0, 1), values.transpose(0, 1), mask))
                    at += w.length
                return out[0] if len(out) == 1 else torch.cat(out)

            return mix

        return plan

    def _plan_varlen(
        self, chunks: Sequence[Work], tables: Sequence[np.ndarray], parts: list[np.ndarray]
    ) -> Callable[[list[Tensor]], Mix]:
        """All chunks in one call; where none has a past, over the new keys themselves."""
        ends = [w.start + w.length for w in chunks]
        longest, longest_context = max(w.length for w in chunks), max(ends)
        first, is_fresh = len(parts), all(w.start == 0 for w in chunks)
        parts += [bounds_of([w.length for w in chunks]), bounds_of(ends)]
        if not is_fresh:
            parts.append(np.concatenate([self._context(w, ids) for w, ids in zip(chunks, tables, strict=True)]))

        def plan(moved: list[Tensor]) -> Mix:
            bounds, context_bounds = moved[first], moved[first + 1]
            context = None if is_fresh else moved[first + 2]

            def mix(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
                keys, values = (key, value) if context is None else cache[context].unbind(1)
                # Causal from the end: the last query of a chunk sees its whole context.
                return self._varlen(query, keys, values, bounds, context_bounds, longest, longest_context, causal=True)

            return mix

        return plan


def num_splits(pairs: int, processors: int) -> int:
    """Parts that each sequence is cut into, a power of two, so that `pairs` of sequence and kv head give every
    multiprocessor about two programs. It does not depend on lengths, so that a recorded step may keep it."""
    splits = 1
    while splits < MAX_SPLITS and pairs * splits * 2 <= 2 * processors:
        splits *= 2
    return splits


def upload(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int32 arrays as tensors on the device, through one copy that the host does not wait for.

    Every part begins at a multiple of 16 bytes: Triton compiles anew for pointers that do not.
    """
    starts, size = [], 0
    for part in parts:
        starts.append(size)
        size += -(-part.size // 4) * 4
    # The host allocator keeps pinned memory until the copy out of it is over, whoever lets go of it before.
    host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    flat = host.numpy()
    for part, start in zip(parts, starts, strict=True):
        flat[start : start + part.size] = part.ravel()
    moved = host.to(device, non_blocking=True)
    return [moved[start : start + part.size].view(part.shape) for part, start in zip(parts, starts, strict=True)]


def num_copies(shape: CacheShape, *, enable_prefix_caching: bool) -> int:
    """How often the store of this device may hold a block: rows have their kept prefixes beside them."""
    return 2 if shape.device.type != "cuda" and enable_prefix_caching else 1


def build_store(
    shape: CacheShape,
    num_blocks: int,
    block_size: int,
    *,
    use_flash_attention: bool,
    enable_prefix_caching: bool = True,
) -> tuple[KVStore, str]:
    """The store that suits the device, and a sentence for the log that says which and why."""
    if shape.device.type != "cuda":
        kept = num_blocks if enable_prefix_caching else 0
        store = RowStore(shape, kept, block_size, max_tokens=num_blocks * block_size)
        return store, f"{store.name}: dense rows, as the device is {shape.device.type}"
    fault = _triton_fault(shape, block_size)
    reasons = [f"the device is {torch.cuda.get_device_name(shape.device)}"]
    reasons += [f"no Triton decode: {fault}"] if fault else []
    varlen, why_not = find_flash(shape, is_wanted=use_flash_attention)
    name = "flash-attn"
    if varlen is None:
        reasons.append(f"no flash-attn: {why_not}")
        varlen, why_not = find_torch(shape)
        name = "torch-varlen"
        reasons += [f"no varlen of torch: {why_not}"] if varlen is None else []
    backend = "sdpa" if fault else "triton"
    paged = PagedStore(shape, num_blocks, block_size, backend=backend, varlen=varlen, varlen_name=name)
    return paged, f"{paged.name}: {'; '.join(reasons)}"


def _triton_fault(shape: CacheShape, block_size: int) -> str:
    """Why the Triton kernel can't be used here; nothing if it can: it was tried."""
    try:
        from model_core.language.paged_decode_kernel import find_fault  # noqa: PLC0415  Triton is not everywhere
    except ImportError as error:
        return str(error)
    size = (TRIAL_BLOCKS * block_size, 2, shape.num_kv_heads, shape.head_dim)
    return find_fault(torch.empty(size, device=shape.device, dtype=shape.dtype), block_size)


class _Table:
    """One open sequence's block ids as an array that grows with them."""

    __slots__ = ("_count", "_ids")

    def __init__(self) -> None:
        self._ids, self._count = np.empty(16, dtype=np.int32), 0

    def first(self, count: int, blocks: Sequence[int]) -> np.ndarray:
        """(count,) int32. `blocks` is what it was the last time, with new ids behind."""
        if count > self._count:
            if count > len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty(count, dtype=np.int32)])
            self._ids[self._count : count] = blocks[self._count : count]
            self._count = count
        return self._ids[:count]


def _as_rows(work: Sequence[Work], tables: Sequence[np.ndarray]) -> np.ndarray:
    """(B, 1 + W) int32: length and block ids of single-token work, zeros behind them."""
    rows = np.zeros((len(work), 1 + max(len(ids) for ids in tables)), dtype=np.int32)
    for row, w, ids in zip(rows, work, tables, strict=True):
        row[0] = w.start + 1
        row[1 : 1 + len(ids)] = ids
    return rows


def _mask(start: int, length: int, shape: CacheShape) -> Tensor | None:
    """As `chunk_mask`; on CUDA a stand-in by which SDPA's flash kernel knows what to leave out, without a mask."""
    if shape.device.type == "cuda" and shape.dtype in FLASH_DTYPES and start and length > 1:
        return causal_lower_right(length, start + length)
    return chunk_mask(start, length, shape.device)
