"""Keys and values of the running sequences, one dense block a layer, rows packed at the front.

Capacity is a power of two in rows and steps in length, fitted to the need whenever it must grow.
Freeing a row moves the last one into its place, so a decode step always reads rows 0..n without a
gather. Knows no request: the caller keeps which row is whose.
"""

from __future__ import annotations

import torch
from torch import Tensor

LENGTH_STEP = 256


class BatchCache:
    """For each layer keys and values (rows, K, length, dh); `lengths[row]` tokens of a row are filled."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_layers, self._heads, self._head_dim = num_layers, num_kv_heads, head_dim
        self._device, self._dtype = device, dtype
        self._store: Tensor | None = None  # (L, 2, rows, K, length, dh)
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        return 0 if self._store is None else self._store.numel() * self._store.element_size()

    def add_row(self, length: int) -> int:
        """Make room for a sequence of `length` tokens; its row index."""
        self._reserve(len(self.lengths) + 1, max([length, *self.lengths]))
        self.lengths.append(0)
        return len(self.lengths) - 1

    def remove_row(self, row: int) -> int:
        """Free a row. Returns the row whose sequence now lives in `row` (equal to `row` if none moved)."""
        last = len(self.lengths) - 1
        if row != last:
            n = self.lengths[last]
            self._store[:, :, row, :, :n] = self._store[:, :, last, :, :n]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self._store = None
        return last

    def write(self, layer: int, row: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (K, T, dh) of one row from `start`; all of the row's keys and values up to there."""
        end = start + keys.shape[1]
        self._store[layer, 0, row, :, start:end] = keys
        self._store[layer, 1, row, :, start:end] = values
        return self._store[layer, 0, row, :, :end], self._store[layer, 1, row, :, :end]

    def append(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Store one token for every row, (rows, K, dh) at `positions` (rows,). Returns views (rows, K, length, dh)."""
        n = keys.shape[0]
        rows = torch.arange(n, device=keys.device)
        self._store[layer, 0, rows, :, positions] = keys
        self._store[layer, 1, rows, :, positions] = values
        return self._store[layer, 0, :n, :, :length], self._store[layer, 1, :n, :, :length]

    def reserve_next(self) -> None:
        """Room for one more token in every row."""
        self._reserve(len(self.lengths), max(self.lengths) + 1)

    def _reserve(self, rows: int, length: int) -> None:
        have_rows, have_length = (0, 0) if self._store is None else (self._store.shape[2], self._store.shape[4])
        if rows <= have_rows and length <= have_length:
            return
        # By need, not by what there was: a new store is the occasion to give back what left.
        want_rows, want_length = 1 << (rows - 1).bit_length(), -(-(length + 1) // LENGTH_STEP) * LENGTH_STEP
        shape = (self.num_layers, 2, want_rows, self._heads, want_length, self._head_dim)
        grown = torch.zeros(shape, device=self._device, dtype=self._dtype)
        if self._store is not None:
            n, filled = len(self.lengths), max(self.lengths, default=0)
            grown[:, :, :n, :, :filled] = self._store[:, :, :n, :, :filled]
        self._store = grown
