"""Times the way from a JPEG to fused tokens, stage by stage: preprocessing, upload, each encoder, fusion.

In: a model, its input format, pictures and a clock. Out: milliseconds an image, and the share of an arithmetic bound.
Warmed up, synchronised, medians. Runs no language model; prints nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_core.analysis.flops import tower_flops
from model_core.model import DualVisionModel
from model_core.processing.batch import InputFormat, normalise_pixels
from model_core.processing.images import Patches, open_image, to_patches
from model_core.vision_tokens import cell_grids

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class EncoderSpeed:
    """Of one picture size and batch.

    stage_ms: milliseconds AN IMAGE by stage: preprocess (one picture after the other, on the CPU), upload (with
    normalisation), every encoder by its name, fusion.
    flops: operations an image by encoder.
    """

    image_size: int
    batch: int
    vision_tokens: int
    stage_ms: dict[str, float]
    flops: dict[str, int]

    @property
    def total_ms(self) -> float:
        return sum(self.stage_ms.values())

    @property
    def images_per_second(self) -> float:
        return 1000 / self.total_ms

    def bound_shares(self, peak_gflops: float) -> dict[str, float]:
        """Share of `peak_gflops` that each encoder reaches, and under `total` the whole way does."""
        shares = {name: flops / (self.stage_ms[name] * peak_gflops * 1e6) for name, flops in self.flops.items()}
        shares["total"] = sum(self.flops.values()) / (self.total_ms * peak_gflops * 1e6)
        return shares

    def to_dict(self, peak_gflops: float | None = None) -> dict[str, Any]:
        found = {
            "image_size": self.image_size,
            "batch": self.batch,
            "vision_tokens": self.vision_tokens,
            "stage_ms": self.stage_ms,
            "total_ms": self.total_ms,
            "images_per_second": self.images_per_second,
            "gflop": {name: flops / 1e9 for name, flops in self.flops.items()},
        }
        return found if peak_gflops is None else found | {"bound_shares": self.bound_shares(peak_gflops)}


def time_encoders(
    model: DualVisionModel, fmt: InputFormat, clock: Clock, jpegs: Sequence[bytes], *, rounds: int = 5, warmup: int = 2
) -> EncoderSpeed:
    """`jpegs` as one batch, all of one size, `warmup` + `rounds` times.

    Both encoders run, even where a fresh model's fusion would skip the second.
    """
    samples: list[dict[str, float]] = []
    patches: list[Patches] = []
    for _ in range(warmup + rounds):
        sample, patches = _one_round(model, fmt, clock, jpegs)
        samples.append(sample)
    measured = samples[warmup:]
    t, h, w = patches[0].grid
    return EncoderSpeed(
        image_size=open_image(jpegs[0], fmt.limits, allow_paths=False).image.width,
        batch=len(jpegs),
        vision_tokens=t * h * w // model.config.merge_size**2 * model.fusion.tokens_per_cell,
        stage_ms={
            name: 1000 * statistics.median(sample[name] for sample in measured) / len(jpegs) for name in measured[0]
        },
        flops=tower_flops(model.config, patches[0].grid),
    )


@torch.inference_mode()
def _one_round(
    model: DualVisionModel, fmt: InputFormat, clock: Clock, jpegs: Sequence[bytes]
) -> tuple[dict[str, float], list[Patches]]:
    """Seconds of each stage for the whole batch, and the patches that it was cut into."""
    device, backbone = model.device, model.model

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    seconds = {}
    begin = now()
    patches = [to_patches(open_image(jpeg, fmt.limits, allow_paths=False).image, fmt.patches) for jpeg in jpegs]
    pixels = np.concatenate([one.pixels for one in patches])
    seconds["preprocess"] = now() - begin
    begin = now()
    values = normalise_pixels(pixels, fmt.patches, device)
    grid_thw = torch.tensor([one.grid for one in patches])
    seconds["upload"] = now() - begin
    features: dict[str, Tensor] = {}
    for name in backbone.encoders:
        begin = now()
        features |= backbone.infer_images(values, grid_thw, [name])
        seconds[name] = now() - begin
    begin = now()
    backbone.fuse(features, cell_grids(grid_thw, model.config.merge_size))
    seconds["fusion"] = now() - begin
    return seconds, patches
