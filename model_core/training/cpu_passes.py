"""Norms and rotary positions of a training step on a CPU in fewer passes over memory, forward and backward.

A step on a CPU is mostly not products: of one of the demo's (64 pictures with four questions each) in bfloat16 a fifth
was. RMSNorm is six operations of torch's and nine more in its gradient, a rotary embedding is five and nine; each reads
and writes everything. In: a model; out: within `fewer_passes` its modules compute the same to rounding. Weights, names
and what a checkpoint holds stay; so do hooks, which run around a module's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from model_core.encoders.segments import SegmentVisionAttention


@contextmanager
def fewer_passes(model: nn.Module) -> Iterator[None]:
    """A module whose forward someone else replaced keeps that."""
    norms = [m for m in model.modules() if type(m) is Qwen2_5_VLRMSNorm and "forward" not in vars(m)]
    attentions = [m for m in model.modules() if isinstance(m, SegmentVisionAttention) and "rotate" not in vars(m)]
    try:
        for module in norms:
            module.forward = partial(_normed, module)  # type: ignore[method-assign]
        for module in attentions:
            module.rotate = rotate_patches
        yield
    finally:
        for module in norms:
            module.__dict__.pop("forward", None)
        for module in attentions:
            module.__dict__.pop("rotate", None)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., C) by (C,) -> (..., C): weight * x / rms(x), the mean in float32 (Zhang and Sennrich 2019, 1910.07467)."""
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def rotate_tokens(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(S, H, dh) and (S, K, dh), turned by (1, S, dh), in float32, and given back in the type that they came in."""
    cos, sin = cos[0, :, None], sin[0, :, None]
    return _Rotated.apply(query, cos, sin), _Rotated.apply(key, cos, sin)


def rotate_patches(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotate_tokens`, by (S, dh)."""
    return rotate_tokens(query, key, cos[None], sin[None])


def _normed(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, weight, scale)
        return weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        normed, weight, scale = ctx.saved_tensors
        along = gradient.float() * normed  # of each number, what it has of both gradients
        own = along.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, own, None
        mean = (along @ weight.float()).unsqueeze(-1).div_(normed.shape[-1])
        wide = torch.addcmul(gradient * weight.float(), normed, mean.neg_()).mul_(scale)
        return wide.to(normed.dtype), own, None


class _Rotated(torch.autograd.Function):
    """cos, sin: (S, 1, dh), as transformers has them; the halves of a head belong together. Its gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half, wide = x.shape[-1] // 2, x.float()
        turned = wide * cos
        turned[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(wide[..., :half], sin[..., half:])
        return turned.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half, wide = gradient.shape[-1] // 2, gradient.float()
        turned = wide * cos
        turned[..., :half].addcmul_(wide[..., half:], sin[..., half:])
        turned[..., half:].addcmul_(wide[..., :half], sin[..., :half], value=-1)
        return turned.to(gradient.dtype), None, None
