"""Qwen's vision tower (2502.13923, section 2.1.1) in inference on a CPU: a lean forward over the SAME parameters.

Patches (S, P) in, merged tokens (S / m^2, D) out. What the modules compute, in fewer passes over memory; sums come in
another order, so results agree to rounding (1e-6 of their size). Which rows stand in which window depends on the grids
alone and is kept for those that come again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from model_core.encoders import lean
from model_core.encoders.segments import SegmentPlan, SegmentVisionAttention, attend_by_length
from model_core.vision_tokens import Grid

TYPES = lean.COMMON | {
    nn.Conv3d, nn.SiLU, SiLUActivation, SegmentVisionAttention,
    qwen.Qwen2_5_VisionTransformerPretrainedModel, qwen.Qwen2_5_VisionPatchEmbed, qwen.Qwen2_5_VLVisionRotaryEmbedding,
    qwen.Qwen2_5_VLVisionBlock, qwen.Qwen2_5_VLMLP, qwen.Qwen2_5_VLRMSNorm, qwen.Qwen2_5_VLPatchMerger,
}  # fmt: skip
#: Layouts that are kept: of a large picture one takes half a megabyte.
_NUM_LAYOUTS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Of pictures with certain grids. order: (S,) the patch that each row of the tower holds, window after window.

    positions: (S, 2) rows' places in their picture. cells: (S / m^2,) where each cell's merged token is. full, windows:
    who sees whom in the two kinds of layers.
    """

    order: Tensor
    positions: Tensor
    cells: Tensor
    full: SegmentPlan
    windows: SegmentPlan


@lru_cache(_NUM_LAYOUTS)
def find_layout(grids: tuple[Grid, ...], merge_size: int, window_size: int, patch_size: int) -> Layout:
    """grids in patches; the sizes are the tower's."""
    # Kept over calls of both kinds: a tensor born in inference mode could not be used outside it.
    with torch.inference_mode(mode=False):
        grid = torch.tensor(grids)
        index, windows = get_vision_window_index(grid, merge_size, window_size, patch_size)
        unit = merge_size**2
        order = (index[:, None] * unit + torch.arange(unit)).flatten()
        return Layout(
            order,
            get_vision_position_ids(grid, merge_size)[order],
            torch.argsort(index),
            SegmentPlan.from_bounds(get_vision_cu_seqlens(grid).tolist(), order.device),
            SegmentPlan.from_bounds(windows.tolist(), order.device),
        )


def forward(module: nn.Module, pixel_values: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """pixel_values (S, P) float32, grids in patches -> (S / m^2, D)."""
    config = module.config
    layout = find_layout(grids, config.spatial_merge_size, config.window_size, config.patch_size)
    patches = module.patch_embed.proj
    # Its kernel is its stride: a product of patches that lie there as rows already.
    hidden = F.linear(pixel_values, patches.weight.flatten(1), patches.bias)[layout.order]
    cos, sin = (x[:, None] for x in module.rotary_pos_emb(hidden, layout.positions))
    for number, block in enumerate(module.blocks):
        plan = layout.full if number in module.fullatt_block_indexes else layout.windows
        _add_attention_(hidden, block, cos, sin, plan)
        normed = lean.rms_norm(hidden, block.norm2)
        gate = F.silu(lean.product(normed, block.mlp.gate_proj), inplace=True)
        gate.mul_(lean.product(normed, block.mlp.up_proj))
        lean.add_product_(hidden, gate, block.mlp.down_proj)
    merger = module.merger
    merged = merger.mlp(lean.rms_norm(hidden, merger.ln_q).view(-1, merger.hidden_size))
    return merged[layout.cells]


def _add_attention_(hidden: Tensor, block: nn.Module, cos: Tensor, sin: Tensor, plan: SegmentPlan) -> None:
    attention, heads = block.attn, block.attn.num_heads
    qkv = lean.product(lean.rms_norm(hidden, block.norm1), attention.qkv).view(hidden.shape[0], 3 * heads, -1)
    turned = _turn(qkv[:, : 2 * heads], cos, sin)
    parts = turned[:, :heads], turned[:, heads:], qkv[:, 2 * heads :]
    mixed = attend_by_length(parts, plan, partial(lean.attend, scale=attention.scaling))
    lean.add_product_(hidden, mixed, attention.proj)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of (S, heads, dh); cos, sin: (S, 1, dh). The halves of a head belong together."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned
