"""How weights lie in memory for the compiled loops (decode_kernel.py): knows arrays, and not what compiles them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Columns of a product that lie together: a few vector registers.
PANEL = 32


def pack_columns(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, K) -> (ceil(N / PANEL), K, PANEL): a panel's columns beside each other, zeros behind N."""
    columns, inner = weight.shape
    padded = np.zeros((-(-columns // PANEL) * PANEL, inner), dtype=np.float32)
    padded[:columns] = weight
    return np.ascontiguousarray(padded.reshape(-1, PANEL, inner).transpose(0, 2, 1))
