"""Patches: resized pixels, order and normalised values equal transformers' Qwen2-VL processor to the bit."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize

from model_core.errors import ImageTooLargeError, ImageTooSmallError, InvalidRequestError
from model_core.processing.images import (
    PatchSpec,
    frames_to_patches,
    normalise,
    num_patches,
    smart_resize,
    to_patches,
)

SPEC = PatchSpec()
SHAPES = [(28, 28), (224, 224), (31, 24), (5, 3), (2, 400), (401, 3), (640, 480), (1000, 37), (57, 333), (1500, 1100)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURE = noise(31, 24)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("spec", [SPEC, PatchSpec(max_pixels=40_000), PatchSpec(patch_size=16, min_pixels=65_536)])
def test_equal_to_transformers(size: tuple[int, int], spec: PatchSpec) -> None:
    """With mean 0, std 1 and no rescale, transformers' output is the resized pixels themselves."""
    image = noise(*size)
    reference = Qwen2VLImageProcessorPil(
        patch_size=spec.patch_size, size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    )
    ours = to_patches(image, spec)
    raw = reference(image, do_rescale=False, do_normalize=False, return_tensors="np")
    assert ours.pixels.dtype == np.uint8 and np.array_equal(ours.pixels, raw["pixel_values"])
    full = reference(image, return_tensors="np")
    assert np.array_equal(normalise(ours.pixels, spec), full["pixel_values"])
    assert normalise(ours.pixels, spec).dtype == np.float32
    assert ours.grid == tuple(full["image_grid_thw"][0])
    assert num_patches(size[1], size[0], spec) == len(ours.pixels)


def test_smart_resize_equals_the_reference_everywhere() -> None:
    chance = random.Random(0)
    for _ in range(5000):
        height, width = chance.randint(1, 3000), chance.randint(1, 3000)
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ImageTooLargeError):
                smart_resize(height, width)
            continue
        assert smart_resize(height, width) == reference_smart_resize(height, width, 28, 3136, 1_003_520)


def test_extreme_shapes() -> None:
    assert smart_resize(10, 2000) == reference_smart_resize(10, 2000, 28, 3136, 1_003_520)
    with pytest.raises(ImageTooLargeError, match="200"):
        smart_resize(10, 2001)
    with pytest.raises(ImageTooSmallError):
        smart_resize(0, 5)


def test_max_pixels_lowers_and_never_raises_the_budget() -> None:
    image = noise(300, 300)
    low = replace(SPEC, max_pixels=20_000)
    assert np.array_equal(to_patches(image, SPEC, 20_000).pixels, to_patches(image, low).pixels)
    assert np.array_equal(to_patches(image, low, 10**9).pixels, to_patches(image, low).pixels)
    assert to_patches(image, SPEC, 0).grid == (1, 2, 2)  # one vision token is the least there is


def test_video_order_by_hand() -> None:
    frames = [noise(84, 56, seed) for seed in range(3)]
    ours = frames_to_patches(frames)
    assert ours.grid == (2, 4, 6)
    stacked = np.stack([np.asarray(frame) for frame in [*frames, frames[-1]]])  # the odd one is repeated
    rows = [
        stacked[2 * t : 2 * t + 2, 14 * (2 * i + k) :, 14 * (2 * j + n) :][:, :14, :14].transpose(3, 0, 1, 2).ravel()
        for t in range(2) for i in range(2) for j in range(3) for k in range(2) for n in range(2)
    ]  # fmt: skip
    assert np.array_equal(ours.pixels, rows)


def test_a_video_of_one_picture_is_that_picture() -> None:
    still = to_patches(PICTURE)
    for count in (1, 2):
        assert np.array_equal(frames_to_patches([PICTURE] * count).pixels, still.pixels)
    assert frames_to_patches([PICTURE] * 5).grid == (3, *still.grid[1:])


def test_videos_that_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no frames"):
        frames_to_patches([])
    with pytest.raises(InvalidRequestError, match="differ"):
        frames_to_patches([noise(56, 56), noise(280, 56)])


def test_no_torch_is_imported() -> None:
    code = "import sys, model_core.processing.images, model_core.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0
