"""A small source of packs made from a seed: pictures of random patches, each with an answer that its colour decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from model_core.language.rope import MropeLayout, mrope_positions
from model_core.training.config import Stage, TrainConfig, parse_config
from model_core.training.data.packs import PackedBatch, SampleRef
from model_core.types import ChatMessage, TextPart
from tests.model_core import tiny

LAYOUT = MropeLayout(merge_size=2, tokens_per_second=2, tokens_per_cell=1)
GRIDS = ((1, 4, 4), (1, 4, 6), (1, 6, 4))


def recipe(**settings: Any) -> TrainConfig:
    """A recipe whose rates move a tiny model within a few steps."""
    base = {"learning_rate": 1e-3, "batch_size": 2, "warmup_steps": 0, "training_mode": "full", "seed": 3}
    if "curriculum_training" in settings or "freeze_config" in settings:
        base.pop("training_mode")
    return parse_config(base | settings)


def pack_of(indices: Sequence[int], *, dataset: str = "toy", with_images: bool = True) -> PackedBatch:
    """Samples by number; sample i is the same in every pack."""
    samples = [_sample(i, with_images=with_images) for i in indices]
    labels = torch.cat([s["labels"] for s in samples])
    return PackedBatch(
        input_ids=torch.cat([s["ids"] for s in samples]),
        labels=labels,
        position_ids=torch.cat([s["positions"] for s in samples], dim=1),
        sample_lengths=tuple(len(s["ids"]) for s in samples),
        pixels=np.concatenate([s["pixels"] for s in samples]) if with_images else None,
        grids=tuple(s["grid"] for s in samples) if with_images else (),
        images_per_sample=tuple(int(with_images) for _ in samples),
        samples=tuple(SampleRef(f"{dataset}:{i}", dataset, i) for i in indices),
        num_label_tokens=int((labels != -100).sum()),
    )


def _sample(index: int, *, with_images: bool) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    grid = GRIDS[index % len(GRIDS)]
    count = grid[1] * grid[2]
    shade = index % 4
    patch = rng.integers(shade * 60, shade * 60 + 40, size=(count, 3, 1, 14 * 14), dtype=np.uint8)
    pixels = np.repeat(patch, 2, axis=2).reshape(count, -1)
    cells = count // 4 if with_images else 0
    text = tiny.byte_tokenizer().encode("what? " + "x" * (index % 5))
    answer = [*tiny.byte_tokenizer().encode("abcd"[shade]), tiny.token_id("<|im_end|>")]
    start, end = tiny.token_id("<|vision_start|>"), tiny.token_id("<|vision_end|>")
    ids = [start, *[tiny.token_id("<|image_pad|>")] * cells, end, *text, *answer]
    types = [0, *[1] * cells, 0, *[0] * (len(text) + len(answer))]
    positions, _ = mrope_positions(types, [grid] if cells else [], [], [], LAYOUT)
    labels = [-100] * (len(ids) - len(answer)) + answer
    return {
        "ids": torch.tensor(ids), "labels": torch.tensor(labels), "positions": positions, "pixels": pixels, "grid": grid
    }  # fmt: skip


class ToySource:
    """`num_samples` of them, shuffled by (seed, stage, epoch)."""

    dataset_names = ("toy",)

    def __init__(self, config: TrainConfig, num_samples: int = 12, *, with_images: bool = True) -> None:
        self.config, self.num_samples, self.with_images = config, num_samples, with_images
        self.num_made = 0

    def prepare_stage(self, stage: Stage) -> None:
        pass

    def num_steps(self, stage: Stage, epoch: int) -> int:
        per_step = self.config.batch_size * self.config.gradient_accumulation_steps
        return -(-self.num_samples // per_step)

    def steps(self, stage: Stage, epoch: int, *, first: int = 0) -> Iterator[list[PackedBatch]]:
        order = list(range(self.num_samples))
        random.Random(f"{self.config.seed}:{stage.index}:{epoch}").shuffle(order)
        packs = [order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size)]
        size = self.config.gradient_accumulation_steps
        for at in range(first * size, len(packs), size):
            self.num_made += 1
            yield [pack_of(pack, with_images=self.with_images) for pack in packs[at : at + size]]

    def conversation(self, ref: SampleRef) -> list[ChatMessage]:
        question = ChatMessage("user", (TextPart(f"what? {ref.index}"),))
        return [question, ChatMessage("assistant", (TextPart("abcd"[ref.index % 4]),))]

    def fingerprint(self) -> str:
        return f"toy-{self.num_samples}-{self.with_images}"

    def quarantine_report(self) -> list[dict[str, Any]]:
        return []
