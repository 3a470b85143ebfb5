"""What the lean forwards of both encoders share: when they may stand for the modules, and operations that pass over
memory fewer times than the modules' own.

On two cores a quarter of an encoder's time was such passes: a convolution where a product does, copies into windows
and back, a norm in six steps. Read from the modules at every call, so there is nothing to keep up to date.
"""

from __future__ import annotations

from collections.abc import Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Types of the modules' parts that do nothing in inference, or do what every encoder's do.
COMMON = frozenset({nn.ModuleList, nn.Sequential, nn.Linear, nn.GELU, nn.Identity, nn.Dropout, nn.LayerNorm})


def can_stand_for(module: nn.Module, types: Set[type[nn.Module]]) -> bool:
    """Whether a lean forward gives what the module would: float32 on a CPU, where it was measured; in inference; and
    every part of exactly these types and without hooks, for LoRA or a debugger must stay in effect."""
    if torch.is_grad_enabled() or module.training or module.config._attn_implementation != "sdpa":
        return False
    first = next(module.parameters())
    if first.device.type != "cpu" or first.dtype != torch.float32:
        return False
    return all(type(m) in types and not (m._forward_hooks or m._forward_pre_hooks) for m in module.modules())


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """(S, D) -> (S, D), as Qwen's norm."""
    size = x.shape[-1]
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(norm.variance_epsilon).rsqrt_()
    return (x * scale).mul_(norm.weight)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def product(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def add_product_(total: Tensor, x: Tensor, linear: nn.Linear) -> None:
    """total (S, N) grows by the product of x (S, K): summed where it lies, without a result of its own."""
    if linear.bias is not None:
        total.add_(linear.bias)
    total.addmm_(x, linear.weight.t())


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """n sequences of one length (n, L, H, dh), each alone -> (n, L, H, dh)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
