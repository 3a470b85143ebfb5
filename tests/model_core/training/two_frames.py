"""Pictures of which each encoder sees a frame of its own, so that a test decides who can know the answer.

A still picture's two frames are the same, and DINOv2 looks at the first. Here they differ, and Qwen's tower is made
blind for the first: its weights for it are zero, and stay so while the tower is frozen. Nothing of the model or the
trainer is replaced.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_core.language.rope import MropeLayout, mrope_positions
from model_core.model import DualVisionModel
from model_core.processing.batch import normalise_pixels
from model_core.training.config import Stage, TrainConfig
from model_core.training.data.packs import PackedBatch, SampleRef
from model_core.types import ChatMessage, TextPart
from tests.model_core import tiny

GRID, NUM_PATCHES, NUM_CELLS = (1, 4, 4), 16, 4
LAYOUT = MropeLayout(merge_size=2, tokens_per_second=2, tokens_per_cell=1)
ANSWERS = "abcd"
#: A pattern for each answer, and one that says: look elsewhere.
PATTERNS = np.random.default_rng(1).integers(0, 256, (len(ANSWERS) + 1, NUM_PATCHES, 3, 196)).astype(np.float64)


def blind_to_first_frames(model: DualVisionModel) -> DualVisionModel:
    """Qwen's tower sees second frames alone."""
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight[:, :, 0] = 0
    return model


class TwoFrames:
    """Questions whose answer one frame of the picture shows, as one of four patterns under noise.

    Args:
        hidden: share of pictures whose answer DINOv2's frame shows and Qwen's does not. In the others it is the other
            way round, and DINOv2's frame is noise.
        has_sign: where the answer is hidden from Qwen its frame shows the fifth pattern; else noise.
        grain: standard deviation of the noise over a pattern, of 255; (Qwen's frame, DINOv2's).
        first: number of the first sample; held-out ones begin elsewhere.
    """

    dataset_names = ("frames",)

    def __init__(
        self, config: TrainConfig, num_samples: int, *, hidden: float = 1.0, has_sign: bool = False,
        grain: tuple[float, float] = (20.0, 20.0), first: int = 0,
    ) -> None:  # fmt: skip
        self.config, self.num_samples, self.first = config, num_samples, first
        self.hidden, self.has_sign, self.grain = hidden, has_sign, grain

    def is_hidden(self, index: int) -> bool:
        return bool(np.random.default_rng((index, 0)).random() < self.hidden)

    def pack(self, indices: Sequence[int]) -> PackedBatch:
        """Samples by number; sample i is the same in every pack, and all have one length."""
        start, end = tiny.token_id("<|vision_start|>"), tiny.token_id("<|vision_end|>")
        prompt = [start, *[tiny.token_id("<|image_pad|>")] * NUM_CELLS, end, *tiny.byte_tokenizer().encode("what? ")]
        answers = [tiny.token_id(ANSWERS[i % len(ANSWERS)]) for i in indices]
        length = len(prompt) + 1
        positions, _ = mrope_positions([int(1 <= i <= NUM_CELLS) for i in range(length)], [GRID], [], [], LAYOUT)
        labels = torch.full((len(indices), length), -100)
        labels[:, -1] = torch.tensor(answers)
        return PackedBatch(
            input_ids=torch.tensor([[*prompt, answer] for answer in answers]).flatten(),
            labels=labels.flatten(),
            position_ids=positions.repeat(1, len(indices)),
            sample_lengths=(length,) * len(indices),
            pixels=np.concatenate([self._pixels(i) for i in indices]),
            grids=(GRID,) * len(indices),
            images_per_sample=(1,) * len(indices),
            samples=tuple(SampleRef(f"frames:{i}", "frames", i) for i in indices),
            num_label_tokens=len(indices),
        )

    def _pixels(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((index, 1))
        noise = [rng.integers(0, 256, (NUM_PATCHES, 3, 196)) for _ in range(2)]
        grains = [rng.normal(0, grain, (NUM_PATCHES, 3, 196)) for grain in self.grain]
        qwens, dinov2s = PATTERNS[index % len(ANSWERS)] + grains[0], noise[1]
        if self.is_hidden(index):
            qwens = PATTERNS[-1] + grains[0] if self.has_sign else noise[0]
            dinov2s = PATTERNS[index % len(ANSWERS)] + grains[1]
        frames = np.stack([dinov2s, qwens], axis=2)  # (patches, colours, frames, pixels)
        return frames.clip(0, 255).astype(np.uint8).reshape(NUM_PATCHES, -1)

    def prepare_stage(self, stage: Stage) -> None:
        pass

    def num_steps(self, stage: Stage, epoch: int) -> int:
        return -(-self.num_samples // self.config.batch_size)

    def steps(self, stage: Stage, epoch: int, *, first: int = 0) -> Iterator[list[PackedBatch]]:
        order = list(range(self.first, self.first + self.num_samples))
        random.Random(f"{self.config.seed}:{stage.index}:{epoch}").shuffle(order)
        size = self.config.batch_size
        for at in range(first * size, len(order), size):
            yield [self.pack(order[at : at + size])]

    def conversation(self, ref: SampleRef) -> list[ChatMessage]:
        answer = ANSWERS[ref.index % len(ANSWERS)]
        return [ChatMessage("user", (TextPart("what? "),)), ChatMessage("assistant", (TextPart(answer),))]

    def fingerprint(self) -> str:
        return f"frames-{self.first}-{self.num_samples}-{self.hidden}"

    def quarantine_report(self) -> list[dict[str, Any]]:
        return []


@torch.no_grad()
def said(model: DualVisionModel, pack: PackedBatch) -> Tensor:
    """(num_samples,) bool: is the most likely token the answer? By the model's own forward, not the trainer's."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    num = len(pack.samples)
    ids = pack.input_ids.view(num, -1)
    pixels = normalise_pixels(pack.pixels, tiny.processor().patch_spec, torch.device("cpu"))
    logits = model(
        input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor(pack.grids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(), position_ids=pack.position_ids.view(3, num, -1),
    ).logits  # fmt: skip
    for module, mode in was_training.items():
        module.training = mode
    return logits[:, -2].argmax(-1) == ids[:, -1]
