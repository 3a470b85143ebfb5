"""Matrix products of inference on CPUs through oneDNN, over the weights that torch holds.

torch gives float32 products to MKL, which for thin inputs on processors that are not Intel's is slower than oneDNN:
on two Zen 4 cores 16 rows by a weight of (1536, 256) that is not in the cache took 420 us, by oneDNN 200 over the
weight as it lies and 100 over a copy in its own layout. Products of hundreds of rows, as in the encoders, gained 0 to
7 % and stay torch's.
Knows tensors; no module and no model.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

#: A larger language model keeps one copy of its weights: on a CPU memory is then what there is least of.
COPIED_BYTES = 4 * 2**30
#: Rows that a copy's layout is chosen for: about a decode step's.
_TYPICAL_ROWS = 16
_DTYPES = (torch.float32, torch.bfloat16)


class Product(Protocol):
    """x (..., K) by one weight (N, K). copied_bytes: what it holds beside the weight."""

    copied_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """(..., N)."""

    def added_to(self, total: Tensor, x: Tensor) -> Tensor:
        """total (S, N) plus the product of x (S, K)."""


class PlainProduct:
    """torch's own, over the weight itself: right for every device and type."""

    copied_bytes = 0

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._turned = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def added_to(self, total: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(total, x, self._turned)


class PackedProduct:
    """Over a copy in oneDNN's layout. The copy does not follow the weight: whoever holds it watches for changes."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
        self._bias = bias
        self.copied_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")

    def added_to(self, total: Tensor, x: Tensor) -> Tensor:
        return total + self(x)


def can_use_onednn(weight: Tensor) -> bool:
    """Do this build of torch and this processor have oneDNN's product for such a weight?"""
    return weight.device.type == "cpu" and weight.dtype in _DTYPES and _has_product(weight.dtype)


@functools.cache
def _has_product(dtype: torch.dtype) -> bool:
    """Found by one small product: a processor without units for bfloat16 raises, and nothing tells it beforehand."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        PackedProduct(torch.zeros(8, 8, dtype=dtype))(torch.zeros(1, 8, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False
    return True
