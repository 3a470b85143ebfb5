"""DINOv2 (2304.07193), with or without registers (2309.16588), on Qwen's own pixels and grid.

Qwen resizes to multiples of 28 px and DINOv2's patch is 14 px, so its patch grid IS Qwen's: a 2x2
merge gives the same cells in the same order for any aspect ratio. The pixels are recovered from
Qwen's patches on the device; nothing is decoded, resized or uploaded twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from model_core.config import DualVisionConfig
from model_core.encoders import lean, lean_dinov2
from model_core.encoders.base import PixelSpec, VisionEncoder
from model_core.errors import ConfigError
from model_core.vision_tokens import Grid, VisionTokens, cell_grids

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def recover_pixels(patches: Tensor, grid: tuple[int, int, int], spec: PixelSpec) -> Tensor:
    """Undo Qwen's patch layout: (t*h*w, 3*f*p*p) -> frames (t, f, 3, p*h, p*w), still CLIP-normalised."""
    t, h, w = grid
    m, f, p = spec.merge_size, spec.temporal_patch_size, spec.patch_size
    x = patches.view(t, h // m, w // m, m, m, 3, f, p, p)
    return x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t, f, 3, h * p, w * p)


def to_imagenet(pixels: Tensor, spec: PixelSpec) -> Tensor:
    """CLIP-normalised pixels (..., 3, H, W) as ImageNet-normalised ones."""

    def channel(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)

    mean, std = channel(spec.image_mean), channel(spec.image_std)
    return (pixels * std + mean - channel(IMAGENET_MEAN)) / channel(IMAGENET_STD)


def _first_frames(patches: Tensor, spec: PixelSpec) -> Tensor:
    """Qwen's patches (S, 3*f*p*p), CLIP-normalised -> (S, 3, p*p) of the first frame, ImageNet-normalised: in one pass
    over memory what `recover_pixels` and `to_imagenet` do in five."""
    offset, scale = (to_imagenet(torch.full((3, 1, 1), x), spec)[..., 0] for x in (0.0, 1.0))
    return torch.addcmul(offset, patches.unflatten(1, (3, spec.temporal_patch_size, -1))[:, :, 0], scale - offset)


def budgeted_grid(h: int, w: int, max_patches: int) -> tuple[int, int]:
    """The largest grid of about the same shape with at most `max_patches` patches."""
    if h * w <= max_patches:
        return h, w
    scale = math.sqrt(max_patches / (h * w))
    small_h, small_w = max(1, math.floor(h * scale)), max(1, math.floor(w * scale))
    return min(small_h, max_patches // small_w or 1), min(small_w, max_patches)


def _by_shape(grids: Sequence[Grid]) -> dict[tuple[int, int], list[int]]:
    """(h, w) -> which pictures have it."""
    found: dict[tuple[int, int], list[int]] = {}
    for number, (_, h, w) in enumerate(grids):
        found.setdefault((h, w), []).append(number)
    return found


class DinoV2Encoder(VisionEncoder):
    """2x2 neighbouring DINOv2 patches unshuffled into one token of width 4*d a cell.

    Video: a cell is two frames; DINOv2 sees the first of each pair.
    """

    name = "dinov2"

    def __init__(self, config: DualVisionConfig) -> None:
        super().__init__(config)
        patch = config.dinov2_config.patch_size
        if patch != self.spec.patch_size:
            raise ConfigError(
                "this DINOv2 does not share Qwen's patch size, so tokens can't align",
                value=patch,
                allowed=str(self.spec.patch_size),
                fix="Choose a patch-14 DINOv2, or bring your own encoder as 'package.module:Class'",
            )
        self.num_prefix_tokens = 1 + getattr(config.dinov2_config, "num_register_tokens", 0)

    @property
    def output_dim(self) -> int:
        return self.config.dinov2_config.hidden_size * self.spec.merge_size**2

    def build(self) -> nn.Module:
        return AutoModel.from_config(self.config.dinov2_config)

    def encode(self, module: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> VisionTokens:
        grids = [tuple(g) for g in grid_thw.tolist()]
        parts = pixel_values.split([t * h * w for t, h, w in grids])
        cells: list[Tensor] = [pixel_values] * len(grids)
        for (h, w), members in _by_shape(grids).items():
            frames = [recover_pixels(parts[i].float(), grids[i], self.spec)[:, 0] for i in members]
            features = self._forward(module, to_imagenet(torch.cat(frames), self.spec), h, w)  # (F, h*w, d)
            unshuffled = self._unshuffle(features, h, w)  # (F, h*w/m^2, m^2*d)
            for i, part in zip(members, unshuffled.split([f.shape[0] for f in frames]), strict=True):
                cells[i] = part.flatten(0, 1)
        return VisionTokens(torch.cat(cells), cell_grids(grid_thw, self.spec.merge_size))

    def infer(self, module: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> VisionTokens:
        grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
        is_whole = all(budgeted_grid(h, w, self.config.dinov2_max_patches) == (h, w) for _, h, w in grids)
        is_own = type(self).encode is DinoV2Encoder.encode  # a subclass may encode in another way
        if not is_own or not is_whole or not lean.can_stand_for(module, lean_dinov2.TYPES):
            return self.encode(module, pixel_values, grid_thw)
        cells: list[Tensor] = [pixel_values] * len(grids)
        parts = pixel_values.split([t * h * w for t, h, w in grids])
        for (h, w), members in _by_shape(grids).items():
            patches = parts[members[0]] if len(members) == 1 else torch.cat([parts[i] for i in members])
            found = lean_dinov2.forward(module, _first_frames(patches, self.spec), h, w, self.spec)
            sizes = [grids[i][0] * h * w // self.spec.merge_size**2 for i in members]
            for i, part in zip(members, found.split(sizes), strict=True):
                cells[i] = part
        return VisionTokens(torch.cat(cells), cell_grids(grid_thw, self.spec.merge_size))

    def _forward(self, module: nn.Module, pixels: Tensor, h: int, w: int) -> Tensor:
        """ImageNet-normalised frames (F, 3, 14h, 14w) -> patch features (F, h*w, d), through the budget."""
        small_h, small_w = budgeted_grid(h, w, self.config.dinov2_max_patches)
        patch = self.spec.patch_size
        if (small_h, small_w) != (h, w):
            size = (small_h * patch, small_w * patch)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        features = module(pixels.to(module.dtype)).last_hidden_state[:, self.num_prefix_tokens :]
        if (small_h, small_w) != (h, w):
            grid = features.unflatten(1, (small_h, small_w)).permute(0, 3, 1, 2).float()
            grid = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False)
            features = grid.permute(0, 2, 3, 1).flatten(1, 2).to(features.dtype)
        return features

    def _unshuffle(self, features: Tensor, h: int, w: int) -> Tensor:
        m = self.spec.merge_size
        x = features.view(features.shape[0], h // m, m, w // m, m, -1).transpose(2, 3)
        return x.reshape(features.shape[0], (h // m) * (w // m), -1)
