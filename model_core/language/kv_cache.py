"""Where keys and values of running sequences live, and attention over them for one packed step.

A `KVStore` serves one forward at a time: `begin(work)` says which tokens of which sequences are packed in
what order, and gives the function that the decoder calls in each layer. Block ids come from the engine's
block manager; whether they are places (GPU, `paged.py`) or names of kept copies (here) is the store's affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH_STEP = 256
#: (layer, query (S, H, dh), key (S, K, dh), value (S, K, dh)) -> (S, H * dh)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Work:
    """`length` new tokens of the sequence `key`, from place `start` on; `blocks` hold all up to their end."""

    key: Hashable
    start: int
    length: int
    blocks: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one token of KV cache is made of."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class DenseRows:
    """B new tokens of some sequences, in a cache of whole rows on the host.

    rows: (B,) int64. ends: (B,) int64, a sequence's tokens up to the new one, itself included. cache:
    (L, 2, rows, K, T, dh).
    """

    rows: np.ndarray
    ends: np.ndarray
    cache: Tensor


class KVStore(ABC):
    """One for each engine. Single-token work (decode) must stand before longer work in a step."""

    name: str
    #: Are all rows as long as the longest? Then it is their number times that which must fit the cache.
    has_even_rows = False

    @abstractmethod
    def open(self, key: Hashable, cached: Sequence[int] = ()) -> None:
        """A sequence begins to run; the kept blocks `cached` hold its first tokens."""

    @abstractmethod
    def close(self, key: Hashable) -> None:
        """It stops running (ended, aborted, preempted). An unknown key is ignored."""

    @abstractmethod
    def begin(self, work: Sequence[Work]) -> Attend:
        """Make ready for one forward over the packed tokens of `work`. A repeated step writes the same places."""

    def dense(self, work: Sequence[Work]) -> DenseRows | None:
        """Make ready for `work`, for somebody who reads and writes whole rows. None: it has none."""
        del work
        return None

    @abstractmethod
    def keep(self, key: Hashable, first: int, blocks: Sequence[int]) -> None:
        """The sequence's block number `first` and those after it are full: keep their content under these ids."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Is this sequence open?"""

    @property
    @abstractmethod
    def num_open(self) -> int: ...


def attend_padded(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
    """One query token a row: (B, H, dh) over (B, K, T, dh), of which lengths (B,) are real (None: all).

    Returns (B, H, dh). Scores are taken in the cache's own precision, as SDPA does.
    """
    mask = None
    if lengths is not None:
        mask = (torch.arange(keys.shape[2], device=keys.device) < lengths[:, None])[:, None, None]
    grouped = query.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=mask, enable_gqa=grouped)
    return out[:, :, 0]


def attend_chunk(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """A chunk of one sequence: (T, H, dh) over (K, N, dh), N >= T, causal from the end. Returns (T, H, dh)."""
    grouped = query.shape[1] != keys.shape[0]
    is_causal = mask is None and query.shape[0] > 1
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


def chunk_mask(start: int, length: int, device: torch.device) -> Tensor | None:
    """(T, start + T) bool: token i sees everything up to itself. None where SDPA's own causal mask says it."""
    if start == 0 or length == 1:
        return None
    return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)


class RowStore(KVStore):
    """Dense rows, for CPUs: a decode step reads all rows through one view, without a gather.

    Rows are packed at the front; closing a row moves the last one into its place. Capacity is a power of two
    in rows and steps in length, fitted to the need whenever it must grow (for that moment the old rows are there
    too) and within `max_tokens`, which the scheduler keeps the need below. Kept blocks are copies beside the
    rows: written once when a block fills, copied into the row of a sequence that shares the prefix.
    """

    name = "rows+sdpa"
    has_even_rows = True

    def __init__(
        self, shape: CacheShape, num_blocks: int = 0, block_size: int = 16, *, max_tokens: int | None = None
    ) -> None:
        self.shape, self.block_size, self._max_tokens = shape, block_size, max_tokens
        self._rows: list[Hashable] = []
        self._row_of: dict[Hashable, int] = {}
        self._lengths: list[int] = []  # tokens filled in each row
        self._store: Tensor | None = None  # (L, 2, rows, K, length, dh)
        kept = (num_blocks, shape.num_layers, 2, shape.num_kv_heads, block_size, shape.head_dim)
        # Not touched until used, so what is never kept takes no memory.
        self._kept = torch.empty(kept, device=shape.device, dtype=shape.dtype) if num_blocks else None

    def __contains__(self, key: object) -> bool:
        return key in self._row_of

    @property
    def num_open(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Of the rows; the kept blocks are counted by the block manager."""
        return 0 if self._store is None else self._store.nbytes

    def open(self, key: Hashable, cached: Sequence[int] = ()) -> None:
        length = len(cached) * self.block_size
        self._reserve(len(self._rows) + 1, max([length + 1, *self._lengths]))
        row = len(self._rows)
        self._rows.append(key)
        self._row_of[key] = row
        self._lengths.append(length)
        if cached:
            blocks = self._kept[torch.tensor(list(cached), device=self.shape.device)]  # (n, L, 2, K, bs, dh)
            self._store[:, :, row, :, :length] = blocks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)

    def close(self, key: Hashable) -> None:
        row = self._row_of.pop(key, None)
        if row is None:
            return
        length = self._lengths[row]
        last, last_key, last_length = len(self._rows) - 1, self._rows.pop(), self._lengths.pop()
        if last_key != key:
            self._store[:, :, row, :, :last_length] = self._store[:, :, last, :, :last_length]
            self._rows[row], self._lengths[row], self._row_of[last_key] = last_key, last_length, row
            self._forget(row, last_length, length)
        self._forget(last, 0, last_length)
        if not self._rows:
            self._store = None

    def _forget(self, row: int, start: int, end: int) -> None:
        """Places behind a row's end are read under a mask, and a NaN left there would come through it: 0 * NaN."""
        if start < end:
            self._store[:, :, row, :, start:end] = 0.0

    def keep(self, key: Hashable, first: int, blocks: Sequence[int]) -> None:
        if not blocks or self._kept is None:
            return
        start, end = first * self.block_size, (first + len(blocks)) * self.block_size
        part = self._store[:, :, self._row_of[key], :, start:end].unflatten(
            3, (len(blocks), -1)
        )  # (L, 2, K, n, bs, dh)
        self._kept[torch.tensor(list(blocks), device=self.shape.device)] = part.permute(3, 0, 1, 2, 4, 5)

    def begin(self, work: Sequence[Work]) -> Attend:
        rows, ends = self._place(work)
        singles = next((i for i, w in enumerate(work) if w.length != 1), len(work))
        decode = self._decode_plan(rows[:singles], ends[:singles]) if singles else None
        chunks = []
        at = singles
        for row, w in zip(rows[singles:], work[singles:], strict=True):
            chunks.append((row, at, w.start, w.length, chunk_mask(w.start, w.length, self.shape.device)))
            at += w.length
        return self._attend(decode, singles, chunks)

    def dense(self, work: Sequence[Work]) -> DenseRows:
        rows, ends = self._place(work)
        lengths = [w.length for w in work]
        each = np.repeat(np.array(rows), lengths)
        # Counted from the end of each piece, so that its last token sees all of it.
        places = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)])
        return DenseRows(each, places + 1, self._store)

    def _place(self, work: Sequence[Work]) -> tuple[list[int], list[int]]:
        """The row of each piece of work and its end there; there is room up to it."""
        ends = [w.start + w.length for w in work]
        self._reserve(len(self._rows), max([*ends, *self._lengths]))
        rows = [self._row_of[w.key] for w in work]
        for row, end in zip(rows, ends, strict=True):
            self._lengths[row] = end
        return rows, ends

    def _attend(self, decode: Callable[..., Tensor] | None, singles: int, chunks: list) -> Attend:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = [decode(layer, query[:singles], key[:singles], value[:singles])] if decode else []
            keys, values = self._store[layer]
            for row, at, start, length, mask in chunks:
                end = start + length
                keys[row, :, start:end] = key[at : at + length].transpose(0, 1)
                values[row, :, start:end] = value[at : at + length].transpose(0, 1)
                new = query[at : at + length]
                parts.append(attend_chunk(new, keys[row, :, :end], values[row, :, :end], mask))
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

        return attend

    def _decode_plan(self, rows: list[int], ends: list[int]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """One token for each of `rows`; in the usual step that is every row in order and needs no gather."""
        device, length = self.shape.device, max(ends)
        index, places = torch.tensor(rows, device=device), torch.tensor(ends, device=device)
        lengths = None if min(ends) == length else places
        is_whole = rows == list(range(len(rows)))
        last = places - 1

        def decode(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._store[layer]
            keys[index, :, last] = key
            values[index, :, last] = value
            keys, values = (x[: len(rows), :, :length] if is_whole else x[index, :, :length] for x in (keys, values))
            return attend_padded(query, keys, values, lengths)

        return decode

    def _reserve(self, rows: int, length: int) -> None:
        have_rows, have_length = (0, 0) if self._store is None else (self._store.shape[2], self._store.shape[4])
        if rows <= have_rows and length <= have_length:
            return
        # By need, not by what there was: a new store is the occasion to give back what left.
        want_rows, want_length = 1 << (rows - 1).bit_length(), -(-(length + 1) // LENGTH_STEP) * LENGTH_STEP
        if self._max_tokens is not None:
            want_length = max(length, min(want_length, self._max_tokens // rows))
            want_rows = max(rows, min(want_rows, self._max_tokens // want_length))
        s = self.shape
        size = (s.num_layers, 2, want_rows, s.num_kv_heads, want_length, s.head_dim)
        grown = torch.zeros(size, device=s.device, dtype=s.dtype)
        if self._store is not None:
            n, filled = len(self._rows), max(self._lengths, default=0)
            grown[:, :, :n, :, :filled] = self._store[:, :, :n, :, :filled]
        self._store = grown
