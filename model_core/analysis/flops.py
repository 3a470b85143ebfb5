"""Floating-point operations that the two vision towers owe for a picture: matrix products, counted from the config.

In: a configuration and a patch grid. Out: operations (a multiplication and an addition are two). What is left out
(norms, activations, softmax, rotations) is no product and takes time all the same, so a share of the machine's peak
made from these figures is a lower bound of how busy it was.
"""

from __future__ import annotations

from typing import Any

from model_core.encoders.dinov2 import budgeted_grid
from model_core.vision_tokens import Grid


def tower_flops(config: Any, grid: Grid) -> dict[str, int]:
    """Operations by encoder name for one picture or video.

    Args:
        config: a DualVisionConfig. A second encoder of the user's own is not counted: nothing is known of it.
        grid: (t, h, w) in patches.
    """
    found = {"qwen": qwen_flops(config.vision_config, grid)}
    if config.encoder == "dinov2":
        found["dinov2"] = dinov2_flops(config.dinov2_config, grid, config.dinov2_max_patches)
    return found


def qwen_flops(vision: Any, grid: Grid) -> int:
    """Qwen2.5-VL's tower (2502.13923, section 2.1.1): windows in most layers, the whole frame in a few."""
    t, h, w = grid
    tokens, width, merge = t * h * w, vision.hidden_size, vision.spatial_merge_size
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    # query, key, value and output; gate, up and down
    dense = 2 * tokens * width * (4 * width + 3 * vision.intermediate_size)
    num_full = len(vision.fullatt_block_indexes)
    pairs = num_full * t * (h * w) ** 2 + (vision.depth - num_full) * t * _window_pairs(vision, h, w)
    merged = width * merge**2
    merger = 2 * (tokens // merge**2) * merged * (merged + vision.out_hidden_size)
    return 2 * tokens * patch * width + vision.depth * dense + 4 * pairs * width + merger


def _window_pairs(vision: Any, h: int, w: int) -> int:
    """Query and key pairs of one frame whose attention stays within windows; those at the border are smaller."""
    side = vision.window_size // vision.patch_size
    heights, widths = ([min(side, n - at) for at in range(0, n, side)] for n in (h, w))
    return sum((a * b) ** 2 for a in heights for b in widths)


def dinov2_flops(dinov2: Any, grid: Grid, max_patches: int) -> int:
    """DINOv2 (2304.07193) on one frame of each pair, shrunk to `max_patches` where it has more."""
    t, h, w = grid
    h, w = budgeted_grid(h, w, max_patches)
    width = dinov2.hidden_size
    tokens = h * w + 1 + getattr(dinov2, "num_register_tokens", 0)
    hidden = int(width * dinov2.mlp_ratio)
    if dinov2.use_swiglu_ffn:
        hidden = (hidden * 2 // 3 + 7) // 8 * 8
    num_mlp = 3 if dinov2.use_swiglu_ffn else 2
    layer = 2 * tokens * width * (4 * width + num_mlp * hidden) + 4 * tokens**2 * width
    embed = 2 * h * w * 3 * dinov2.patch_size**2 * width
    return t * (embed + dinov2.num_hidden_layers * layer)
