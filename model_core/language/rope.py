"""Qwen2.5-VL's three-axis rotary positions (2502.13923, section 2.1.2) as a pure function.

transformers keeps `rope_deltas` as mutable state on the module, so a second prefill corrupts the
first sequence's decode. Here the delta is returned, and whoever owns the sequence keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from model_core.errors import InvalidRequestError
from model_core.vision_tokens import Grid

TEXT, IMAGE, VIDEO = 0, 1, 2
_TAKE_BOTH = "Take input_ids and the grids from one call of the processor"


@dataclass(frozen=True, slots=True)
class MropeLayout:
    """What the positions depend on besides the ids. tokens_per_cell: 2 for interleaved fusion."""

    merge_size: int
    tokens_per_second: int
    tokens_per_cell: int = 1


def mrope_positions(
    token_types: Sequence[int],
    image_grids: Sequence[Grid],
    video_grids: Sequence[Grid],
    seconds_per_grid: Sequence[float],
    layout: MropeLayout,
) -> tuple[Tensor, int]:
    """Positions of one unpadded sequence.

    Args:
        token_types: 0 text, 1 image, 2 video, one a token.
        image_grids, video_grids: PATCH grids (t, h, w) in order of appearance.
        seconds_per_grid: seconds that one temporal step of each video covers.
    Returns:
        positions (3, T) int64 for time, height, width; delta: the next token's position is T + delta.
    Raises:
        InvalidRequestError: placeholders and grids don't match.
    """
    images, videos = iter(image_grids), iter(zip(video_grids, seconds_per_grid, strict=True))
    parts: list[np.ndarray] = []  # numpy's small arrays cost a third of torch's
    position = index = 0
    for kind, run in groupby(token_types):
        length = sum(1 for _ in run)
        if kind == TEXT:
            parts.append(np.broadcast_to(np.arange(position, position + length), (3, length)))
            position += length
        else:
            left = length
            while left > 0:
                grid, interval = _next_grid(kind, images, videos, layout, index)
                part = _grid_positions(grid, interval, layout) + position
                parts.append(part)
                left -= part.shape[1]
                position += max(grid[1], grid[2]) // layout.merge_size
            if left < 0:
                raise InvalidRequestError(
                    "image placeholders don't match the image grids", value=f"{length} placeholders at token {index}",
                    allowed="as many as the grids have tokens", fix=_TAKE_BOTH,
                )  # fmt: skip
        index += length
    if next(images, None) is not None or next(videos, None) is not None:
        raise InvalidRequestError(
            "there are more images than placeholders", value=len(image_grids) + len(video_grids),
            allowed="placeholders for every grid", fix=_TAKE_BOTH,
        )  # fmt: skip
    positions = np.concatenate(parts, axis=1)
    return torch.from_numpy(positions), int(positions.max()) + 1 - index


def _next_grid(
    kind: int, images: Iterator[Grid], videos: Iterator[tuple[Grid, float]], layout: MropeLayout, index: int
) -> tuple[Grid, float]:
    if kind == IMAGE:
        grid = next(images, None)
        if grid is not None:
            return grid, 1.0  # a still image's time axis has one step; no spacing applies
    else:
        pair = next(videos, None)
        if pair is not None:
            return pair[0], layout.tokens_per_second * pair[1]
    raise InvalidRequestError(
        "there are more image placeholders than images", value=f"token {index}",
        allowed="a grid for every image and video", fix=_TAKE_BOTH,
    )  # fmt: skip


def _grid_positions(grid: Grid, interval: float, layout: MropeLayout) -> np.ndarray:
    """(3, N * tokens_per_cell), relative to where the image starts. Times are cut to whole steps from float32."""
    t, h, w = grid[0], grid[1] // layout.merge_size, grid[2] // layout.merge_size
    found = np.empty((3, t, h, w, layout.tokens_per_cell), dtype=np.int64)
    found[0] = (np.arange(t, dtype=np.float32) * np.float32(interval)).astype(np.int64)[:, None, None, None]
    found[1] = np.arange(h)[:, None, None]
    found[2] = np.arange(w)[:, None]
    return found.reshape(3, -1)
