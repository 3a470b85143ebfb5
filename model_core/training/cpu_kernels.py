"""What a training step on a CPU runs in place of torch's kernels whose backward passes are slow there.

On two Sapphire Rapids cores, of a step in bfloat16 on two small encoders (64 pictures, 64 to 100 patches each) the
gradient of the patch projection as a convolution took 0.7 s, as the matrix product that it is 0.02; that of torch's
fused attention took four times as long as products and a softmax. In: calls of torch's functions inside `cpu_kernels`;
out: the same results to rounding. It knows no model.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Longer sequences keep the fused kernel, which holds no scores: these would be (n, H, T, T).
MAX_TOKENS = 512
_FLOAT16S = (torch.bfloat16, torch.float16)


def give_back_memory() -> None:
    """Hand what the C library keeps of freed memory back to the system, where that library is glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class cpu_kernels(TorchFunctionMode):  # noqa: N801 - used as a context, like torch's own
    """Within it patch projections are products, and short attention in 16 bits is products and a softmax."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            found = _attention(*args, **kwargs)
        elif func in (torch.conv2d, torch.conv3d):
            found = _projection(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **more: Any,
) -> Tensor | None:  # fmt: skip
    """As torch's scaled_dot_product_attention, heads sharing keys as their numbers say; None where it is not ours."""
    autocasts = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocasts else query.dtype
    is_short = max(query.shape[-2], key.shape[-2]) <= MAX_TOKENS
    if query.device.type != "cpu" or dtype not in _FLOAT16S or dropout_p or query.ndim != 4 or not is_short:
        return None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        return None
    with torch.autocast("cpu", enabled=False):
        query, key, value = (x.to(dtype) for x in (query, key, value))
        n, heads, length, size = query.shape
        groups = key.shape[1]
        scale = more.get("scale")
        scale = size**-0.5 if scale is None else scale
        # The heads that share a key lie one after the other, as one longer query.
        rows = (query * scale).reshape(n, groups, heads // groups * length, size)
        scores = (rows @ key.transpose(-1, -2)).view(n, heads, length, -1)
        if is_causal:
            attn_mask = torch.ones(length, key.shape[2], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores + torch.zeros(attn_mask.shape, dtype=dtype).masked_fill_(~attn_mask, float("-inf"))
        shares = scores.softmax(-1).view(n, groups, -1, key.shape[2])
        return (shares @ value).view(n, heads, length, -1)


def _projection(
    pixels: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, *spread: Any,
    **more: Any,
) -> Tensor | None:  # fmt: skip
    """A convolution whose windows touch and don't overlap, as one product; None where it is another.

    spread, more: dilation and groups, both plainly 1."""
    kernel = tuple(weight.shape[2:])
    is_spread = not all(_is(value, 1, kernel) for value in (*spread, *more.values()))
    is_plain = _is(padding, 0, kernel) and not is_spread and pixels.ndim == weight.ndim
    if pixels.device.type != "cpu" or not is_plain or tuple(_each(stride, kernel)) != kernel:
        return None
    counts = [size // k for size, k in zip(pixels.shape[2:], kernel, strict=True)]
    if any(count * k != size for count, k, size in zip(counts, kernel, pixels.shape[2:], strict=True)):
        return None
    dims = range(len(kernel))
    split = pixels.reshape(*pixels.shape[:2], *(x for pair in zip(counts, kernel, strict=True) for x in pair))
    places, within = [2 + 2 * i for i in dims], [3 + 2 * i for i in dims]
    rows = split.permute(0, *places, 1, *within).flatten(1 + len(kernel))
    return F.linear(rows, weight.flatten(1), bias).movedim(-1, 1)


def _each(value: Any, kernel: tuple[int, ...]) -> Sequence[Any]:
    """torch takes one number for all dimensions, or one for each; padding also as a word."""
    return value if isinstance(value, Sequence) else [value] * len(kernel)


def _is(value: Any, plain: int, kernel: tuple[int, ...]) -> bool:
    return all(x == plain for x in _each(value, kernel))
