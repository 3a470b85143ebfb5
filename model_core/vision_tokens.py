"""VisionTokens: what an encoder gives and fusion takes. Knows no encoder and no strategy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class VisionTokens:
    """Packed features of several images on one common cell grid.

    tokens: (S, C), image after image, each in raster order of its cells (t, h, w).
    grids: one (t, h, w) an image, in CELLS (merged tokens), so that t*h*w rows belong to it.
    """

    tokens: Tensor
    grids: tuple[Grid, ...]

    @property
    def lengths(self) -> list[int]:
        return cell_counts(self.grids)


def cell_counts(grids: tuple[Grid, ...]) -> list[int]:
    return [t * h * w for t, h, w in grids]


def cell_grids(grid_thw: Tensor, merge_size: int) -> tuple[Grid, ...]:
    """Qwen's patch grids (I, 3) as cell grids."""
    return tuple((int(t), int(h) // merge_size, int(w) // merge_size) for t, h, w in grid_thw.tolist())


def image_index(lengths: list[int], device: torch.device) -> Tensor:
    """(S,) the image that each packed row belongs to."""
    return torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device), output_size=sum(lengths)
    )


def pool(tokens: Tensor, lengths: list[int]) -> Tensor:
    """(I, C) mean over each image's own rows, never across the packed axis.

    One reduction an image: a scatter-add would sum in another order for another batch.
    """
    return torch.stack([part.mean(dim=0) for part in tokens.split(lengths)])
