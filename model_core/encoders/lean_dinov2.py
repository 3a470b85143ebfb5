"""DINOv2 (2304.07193) in inference on a CPU: a lean forward over the SAME parameters.

Qwen's patches in, in Qwen's order, cells (S / m^2, m^2 * d) out. Attention does not ask for an order, so the patches
stay where they are and the positions come to them; the four of a cell then lie together. Results agree with the
modules' to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation
from transformers.models.dinov2 import modeling_dinov2 as dinov2

from model_core.encoders import lean
from model_core.encoders.base import PixelSpec

TYPES = lean.COMMON | {
    nn.Conv2d, GELUActivation, dinov2.Dinov2Model, dinov2.Dinov2Embeddings, dinov2.Dinov2PatchEmbeddings,
    dinov2.Dinov2Encoder, dinov2.Dinov2Layer, dinov2.Dinov2Attention, dinov2.Dinov2LayerScale, dinov2.Dinov2MLP,
    dinov2.Dinov2SwiGLUFFN, nn.SiLU, SiLUActivation,
}  # fmt: skip


def forward(module: nn.Module, pixels: Tensor, h: int, w: int, spec: PixelSpec) -> Tensor:
    """pixels (F * h * w, 3, patch * patch), ImageNet-normalised patches of F frames of one shape -> their cells."""
    merge, embeddings = spec.merge_size, module.embeddings
    patches = embeddings.patch_embeddings.projection
    rows = F.linear(pixels.flatten(1), patches.weight.flatten(1), patches.bias)
    size, length = rows.shape[-1], h * w + 1
    # As the module finds them for a picture of h x w patches: the first token's and the patches', in raster order.
    places = embeddings.interpolate_pos_encoding(
        rows.new_empty(1, 1, 1).expand(1, length, size), h * spec.patch_size, w * spec.patch_size
    )[0]
    tokens = rows.new_empty(rows.shape[0] // (h * w), length, size)
    tokens[:, 0] = embeddings.cls_token[0, 0] + places[0]
    by_cell = places[1:].view(h // merge, merge, w // merge, merge, size).transpose(1, 2).reshape(h * w, size)
    torch.add(rows.view(-1, h * w, size), by_cell, out=tokens[:, 1:])
    hidden = tokens.view(-1, size)
    for layer in module.encoder.layer:
        mixed = _attend(lean.layer_norm(hidden, layer.norm1), layer.attention, length)
        hidden.addcmul_(lean.product(mixed, layer.attention.o_proj), layer.layer_scale1.lambda1)
        hidden.addcmul_(layer.mlp(lean.layer_norm(hidden, layer.norm2)), layer.layer_scale2.lambda1)
    return lean.layer_norm(hidden, module.layernorm).view(-1, length, size)[:, 1:].reshape(-1, merge**2 * size)


def _attend(normed: Tensor, attention: nn.Module, length: int) -> Tensor:
    query, key, value = (
        lean.product(normed, linear).view(-1, length, attention.num_attention_heads, attention.head_dim)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return lean.attend(query, key, value, attention.scaling).reshape(normed.shape[0], -1)
