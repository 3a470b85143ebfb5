"""What an encoder is: patches in, `VisionTokens` out, on the language model's cell grid.

An encoder object holds no weights: it builds its module, which the model keeps under the encoder's
name (so state-dict names stay Hugging Face's), and reads it in `encode`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from model_core.config import DualVisionConfig
from model_core.vision_tokens import VisionTokens


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """How Qwen's processor laid out and normalised the patches that both encoders share."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_config(cls, config: DualVisionConfig) -> PixelSpec:
        vision = config.vision_config
        return cls(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)


class VisionEncoder(ABC):
    """One eye. Subclass it, give it a `name`, and name it in the config as `package.module:Class`."""

    name: str

    def __init__(self, config: DualVisionConfig) -> None:
        self.config = config
        self.spec = PixelSpec.from_config(config)

    @property
    @abstractmethod
    def output_dim(self) -> int:
        """Width C of the tokens that `encode` returns."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A module with fresh weights, for construction and for loading a state dict into."""

    @abstractmethod
    def encode(self, module: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> VisionTokens:
        """Encode packed patches.

        Args:
            module: what `build` returned, now holding weights.
            pixel_values: (sum t*h*w, 3 * temporal * patch * patch) float32, CLIP-normalised, in Qwen's
                order: t, h/m, w/m, m, m, then channel, frame, row, column.
            grid_thw: (I, 3) int64 patch grids.
        Returns:
            tokens (sum t*h*w / m^2, output_dim) on the cell grid, raster order.
        """

    def infer(self, module: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> VisionTokens:
        """The same tokens to rounding, where no gradient is wanted: an encoder may know a shorter way to them."""
        return self.encode(module, pixel_values, grid_thw)
