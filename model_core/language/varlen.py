"""Causal attention over packed sequences of different lengths in one call, on CUDA: flash-attn's kernel, or torch's.

Both give one function; serving's chunks (`paged.py`) and training's samples (`packed.py`) run through it. Whether it
can be used on this device, and why not, is said here. It knows no cache, no step and no sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from model_core.language.kv_cache import CacheShape, attend_chunk, chunk_mask

FLASH_DTYPES = (torch.bfloat16, torch.float16)
#: The oldest NVIDIA cards that both kernels are made for.
LEAST_CAPABILITY = (8, 0)
# For means of normal numbers in bfloat16.
TOLERANCE = 0.05

#: (query (N, H, dh), keys (M, K, dh), values (M, K, dh), bounds of the queries, bounds of the keys, the most queries of
#: a sequence, the most keys, causal=) -> (N, H, dh). Bounds are `bounds_of` the lengths, on the device. Causal counts
#: from the end: the last query of a sequence sees all of its keys.
VarlenAttention = Callable[..., Tensor]


def find_flash(shape: CacheShape, *, is_wanted: bool = True) -> tuple[VarlenAttention | None, str]:
    """flash-attn's function, or why it can't or may not be used."""
    if shape.dtype not in FLASH_DTYPES:
        return None, f"its kernels take bfloat16 and float16, not {str(shape.dtype).removeprefix('torch.')}"
    if not is_wanted:
        return None, "it is not installed" if find_spec("flash_attn") is None else "it was not asked for"
    try:
        return flash_varlen(), ""
    except ImportError as error:
        return None, str(error)


def find_torch(shape: CacheShape) -> tuple[VarlenAttention | None, str]:
    """torch's function where it passes a trial on this device, or why it can't be used."""
    attention = torch_varlen()
    if attention is None:
        return None, "this torch has none"
    if shape.dtype not in FLASH_DTYPES:
        return None, f"it takes bfloat16 and float16, not {str(shape.dtype).removeprefix('torch.')}"
    if shape.device.type == "cuda":
        # Asked before the trial: a kernel that is not made for a card may leave the whole process without one.
        capability = torch.cuda.get_device_capability(shape.device)
        if capability < LEAST_CAPABILITY:
            return None, f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    fault = find_fault(attention, shape)
    return (None, fault) if fault else (attention, "")


def flash_varlen() -> VarlenAttention:
    """flash-attn's own. Raises ImportError."""
    from flash_attn import flash_attn_varlen_func  # noqa: PLC0415  an extra, and only on CUDA

    return flash_attn_varlen_func


def torch_varlen() -> VarlenAttention | None:
    """torch's own under flash-attn's arguments; None in versions without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  not in every torch that we support
    except ImportError:
        return None
    # Its grouped form came later than the kernel itself; with gradients nobody has tried it.
    has_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(query: Tensor, keys: Tensor, values: Tensor, *bounds_and_longest: Tensor | int, causal: bool) -> Tensor:
        groups, options = query.shape[1] // keys.shape[1], {}
        if groups > 1 and has_groups and not torch.is_grad_enabled():
            options["enable_gqa"] = True
        elif groups > 1:
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        # Causal is a window that reaches no token ahead.
        window = (-1, 0 if causal else -1)
        return varlen_attn(query, keys, values, *bounds_and_longest, window_size=window, **options)

    return attend


@torch.no_grad()
def find_fault(attention: VarlenAttention, shape: CacheShape) -> str:
    """Tries it on a prompt and on a chunk with a past. Returns what is wrong, or nothing if all is well."""
    lengths, contexts = (3, 5), (3, 21)
    generator = torch.Generator(shape.device).manual_seed(0)

    def normal(count: int, heads: int) -> Tensor:
        size = (count, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=shape.device).to(shape.dtype)

    query = normal(sum(lengths), 2 * shape.num_kv_heads)
    keys, values = normal(sum(contexts), shape.num_kv_heads), normal(sum(contexts), shape.num_kv_heads)
    bounds, context_bounds = (torch.from_numpy(bounds_of(each)).to(shape.device) for each in (lengths, contexts))
    parts = zip(query.split(lengths), keys.split(contexts), values.split(contexts), strict=True)
    expected = [
        attend_chunk(
            q.float(), k.float().transpose(0, 1), v.float().transpose(0, 1),
            chunk_mask(len(k) - len(q), len(q), shape.device),
        )
        for q, k, v in parts
    ]  # fmt: skip
    try:
        found = attention(query, keys, values, bounds, context_bounds, max(lengths), max(contexts), causal=True)
        error = float((found.float() - torch.cat(expected)).abs().max())
    except (RuntimeError, ValueError, TypeError) as failure:  # TypeError: a torch whose arguments are others
        return str(failure)
    return "" if error < TOLERANCE else f"results are off by {error:.3g}"


def bounds_of(lengths: Sequence[int]) -> np.ndarray:
    """(B + 1,) int32: where each sequence begins, and where the last one ends."""
    return np.cumsum([0, *lengths], dtype=np.int32)
