"""How weights lie in memory for the compiled loops (decode_kernel.py): knows arrays, and not what compiles them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Columns of a product that lie together: a few vector registers.
PANEL = 32
#: Rows of a weight that one turn of the innermost loop takes in, so that a sum is loaded and stored once for eight.
UNROLL = 8


def pack_columns(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, K) -> (ceil(N / PANEL), K / UNROLL, UNROLL, PANEL): a panel's columns one after the other, zeros behind N."""
    columns, inner = weight.shape
    padded = np.zeros((-(-columns // PANEL) * PANEL, inner), dtype=np.float32)
    padded[:columns] = weight
    panels = padded.reshape(-1, PANEL, inner // UNROLL, UNROLL)
    return np.ascontiguousarray(panels.transpose(0, 2, 3, 1))
