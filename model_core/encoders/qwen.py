"""Qwen2.5-VL's own vision tower (2502.13923, section 2.1.1) as an encoder.

The module is transformers', unchanged but for its attention: equal-length windows of all images go
through one attention call instead of a Python loop over every window. Same weights, same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
)
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from model_core.encoders.base import VisionEncoder
from model_core.vision_tokens import VisionTokens, cell_grids


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """How packed segments are grouped: their lengths in order, and the segment numbers of each length."""

    lengths: list[int]
    groups: dict[int, list[int]]

    @classmethod
    def from_bounds(cls, bounds: list[int]) -> SegmentPlan:
        lengths = [end - start for start, end in pairwise(bounds)]
        groups: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            groups.setdefault(length, []).append(number)
        return cls(lengths, groups)


class SegmentVisionAttention(Qwen2_5_VLVisionAttention):
    """Vision attention over packed segments, one batched call for each distinct segment length."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if is_flash_attention_requested(self.config):  # the variable-length kernel needs no grouping
            return super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
        length = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(1, 0, 2, 3).unbind(0)  # each (S, H, dh)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        plan = getattr(cu_seqlens, "segment_plan", None) or SegmentPlan.from_bounds(cu_seqlens.tolist())
        if len(plan.groups) == 1:
            out = self._attend(*(x.unflatten(0, (-1, plan.lengths[0])) for x in (query, key, value)))
            return self.proj(out.reshape(length, -1))
        # split, stack and cat: their gradients are a cat and a split; an index's would be a scatter-add.
        split = [x.split(plan.lengths) for x in (query, key, value)]
        done: list[Tensor | None] = [None] * len(plan.lengths)
        for members in plan.groups.values():
            out = self._attend(*(torch.stack([parts[i] for i in members]) for parts in split))
            for number, part in zip(members, out.unbind(), strict=True):
                done[number] = part
        return self.proj(torch.cat(done).reshape(length, -1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """n segments of one length, (n, size, H, dh) each -> (n, size, H, dh)."""
        attend: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        return out


def install_segment_attention(visual: nn.Module) -> None:
    """Swap each block's attention for ours around the SAME projections; a second call changes nothing."""
    for block in visual.blocks:
        if isinstance(block.attn, SegmentVisionAttention):
            continue
        with torch.device("meta"):
            attention = SegmentVisionAttention(block.attn.config)
        attention.qkv, attention.proj = block.attn.qkv, block.attn.proj
        attention.train(block.attn.training)
        block.attn = attention


class QwenEncoder(VisionEncoder):
    """Merged tokens of Qwen's tower: one a 28 px cell at patch 14, already as wide as the LLM."""

    name = "qwen"

    @property
    def output_dim(self) -> int:
        return self.config.vision_config.out_hidden_size

    def build(self) -> nn.Module:
        visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(self.config.vision_config)
        install_segment_attention(visual)
        return visual

    def encode(self, module: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> VisionTokens:
        vision, device = self.config.vision_config, pixel_values.device
        grid = grid_thw.to("cpu")  # the index arithmetic is a few hundred integers: not worth a kernel each
        window_index, cu_windows = get_vision_window_index(
            grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        cu_full, cu_windows = (_planned(cu, device) for cu in (get_vision_cu_seqlens(grid), cu_windows))
        output = module(
            pixel_values.to(module.dtype),
            grid_thw=grid_thw,
            position_ids=get_vision_position_ids(grid, vision.spatial_merge_size).to(device),
            cu_seqlens=cu_full,
            window_index=window_index.to(device),
            cu_window_seqlens=cu_windows,
        )
        return VisionTokens(output.pooler_output, cell_grids(grid, vision.spatial_merge_size))


def _planned(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Plan the groups once a forward, on the CPU, and let the plan ride on the tensor to every layer."""
    plan, on_device = SegmentPlan.from_bounds(cu_seqlens.tolist()), cu_seqlens.to(device)
    on_device.segment_plan = plan  # type: ignore[attr-defined]
    return on_device
