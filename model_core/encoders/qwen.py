"""Qwen2.5-VL's own vision tower (2502.13923, section 2.1.1) as an encoder.

The module is transformers', unchanged but for its attention (segments.py). In inference on a CPU a lean forward over
its parameters stands for it (lean_qwen.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from model_core.encoders import lean, lean_qwen
from model_core.encoders.base import VisionEncoder
from model_core.encoders.segments import SegmentPlan, install_segment_attention
from model_core.vision_tokens import VisionTokens, cell_grids


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

    def infer(self, module: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> VisionTokens:
        if type(self).encode is not QwenEncoder.encode or not lean.can_stand_for(module, lean_qwen.TYPES):
            return self.encode(module, pixel_values, grid_thw)
        grids = tuple((t, h, w) for t, h, w in grid_thw.tolist())
        tokens = lean_qwen.forward(module, pixel_values.to(module.dtype), grids)
        return VisionTokens(tokens, cell_grids(grid_thw, self.spec.merge_size))


def _planned(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Plan the groups once a forward, on the CPU, and let the plan ride on the tensor to every layer."""
    plan, on_device = SegmentPlan.from_bounds(cu_seqlens.tolist(), device), cu_seqlens.to(device)
    on_device.segment_plan = plan  # type: ignore[attr-defined]
    return on_device
