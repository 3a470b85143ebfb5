"""How the demo's encoders are born: attending to what is alike and near, as trained ones do.

In a trained vision transformer query times key is near a multiple of the identity, value times output near a negative
one, and patches know where they are. Born so, a small one skips the steps that it would take to get there: "Mimetic
initialization" (Trockman and Kolter 2023, 2305.09828, sections 3 and 4). From nothing DINOv2's tower had after 75 steps
of 64 pictures the loss that it otherwise had after 200.
In: a model at birth and a seed. It knows no picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: The paper's, for a ViT-Ti: how much noise and how much identity.
_NOISE_QK, _IDENTITY_QK, _NOISE_VO, _IDENTITY_VO = 0.7, 0.7, 0.4, 0.4


@torch.no_grad()
def attend_as_trained(visual: nn.Module, dinov2: nn.Module, *, seed: int) -> None:
    """Qwen's tower and DINOv2, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in dinov2.encoder.layer:
        attention = layer.attention
        query, key, value, output = _mimetic(attention.o_proj.weight.shape[0], attention.num_attention_heads, generator)
        attention.q_proj.weight.copy_(query)
        attention.k_proj.weight.copy_(key)
        attention.v_proj.weight.copy_(value)
        attention.o_proj.weight.copy_(output)
    places = dinov2.embeddings.position_embeddings
    side = math.isqrt(places.shape[1] - 1)
    places[0, 1:] = sine_places(side, places.shape[2])
    for block in visual.blocks:
        *joined, output = _mimetic(block.attn.proj.weight.shape[0], block.attn.num_heads, generator)
        block.attn.qkv.weight.copy_(torch.cat(joined))
        block.attn.proj.weight.copy_(output)


def _mimetic(size: int, num_heads: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (size, size) of query, key, value and output, as linear layers hold them."""
    queries, keys = [], []
    for _ in range(num_heads):
        left, right = _halves(size, _NOISE_QK, _IDENTITY_QK, generator)
        queries.append(left[: size // num_heads])
        keys.append(right[: size // num_heads])
    value, output = _halves(size, _NOISE_VO, -_IDENTITY_VO, generator)
    return torch.cat(queries), torch.cat(keys), value, output.T


def _halves(size: int, noise: float, identity: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(a, b) with a.T @ b = noise * Z + identity * I, the strongest directions first; Z has singular values below 2."""
    target = noise * torch.randn(size, size, generator=generator) / size**0.5 + identity * torch.eye(size)
    left, values, right = torch.linalg.svd(target)
    root = values.sqrt()
    return (left * root).T, root[:, None] * right


def sine_places(side: int, size: int) -> Tensor:
    """(side * side, size): sines and cosines of row and column, a quarter of the width each, as MoCo v3's ViT has them
    (2104.02057, appendix A)."""
    rates = torch.exp(-math.log(1e4) * torch.arange(size // 4) / (size // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, size)
