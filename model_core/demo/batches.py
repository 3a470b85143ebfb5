"""Generated scenes and their conversations as the trainer's packs: a pure function of (seed, stage, step).

In: a recipe and an InputFormat; out: a BatchSource, to be named as `batch_source` of a recipe. A data set is a kind
of scene, so that `dataset_weights` mixes kinds and every kind has its loss. What the cells show travels as `targets`,
for the losses of guidance.py. It trains nothing and keeps no generator: step n is the same whenever it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_core.checkpoint import LoadOptions
from model_core.demo.artwork import Artwork, load_artwork
from model_core.demo.labels import cell_counts, cell_places
from model_core.demo.rows import Row, answer_weights, blank_row, scene_row
from model_core.demo.scenes import KINDS, Scene, make_scene
from model_core.demo.turns import ByTurns
from model_core.errors import ConfigError
from model_core.processing.batch import InputFormat
from model_core.training.config import Stage, TrainConfig
from model_core.training.data.packs import PackedBatch, SampleRef
from model_core.training.data.prefetch import in_order
from model_core.types import ChatMessage

#: What pictures are scaled to (blank.py), but for the longest; the square one twice as often.
SIZES = (
    *((168, 168), (168, 168), (140, 140), (140, 168), (168, 140)),
    *((140, 196), (196, 140), (112, 224), (224, 112)),
)
_SEEDS_OF_STAGE = 2**26
#: Of what a scene's cells show, one row a cell in the order of the image tokens. Scenes hold them in small integers.
TARGETS: Mapping[str, Callable[[Scene], np.ndarray]] = {
    "class": lambda scene: scene.cell_class.astype(np.int64),
    "colour": lambda scene: scene.cell_colour.astype(np.int64),
    "letters": lambda scene: scene.cell_letters.astype(np.int64),
    "spots": lambda scene: scene.cell_spots.astype(np.int64),
    "counts": lambda scene: cell_counts(scene).astype(np.int64),
    "painted": lambda scene: scene.cell_painted.astype(np.int64),
    "shares": lambda scene: scene.cell_shares,
    "places": cell_places,
}


class SceneSource:
    """Steps of scenes. `batch_size` of the recipe is scenes a pack; training seeds stay below 2**40.

    Args:
        artwork: loaded, or the folder where it is kept; None is the user's cache.
        steps_per_epoch: how long an epoch is, of scenes that have no end.
        sizes: (height, width), one drawn for each pack.
    """

    dataset_names = KINDS

    def __init__(
        self, config: TrainConfig, fmt: InputFormat, *, artwork: Artwork | str | None = None,
        steps_per_epoch: int = 50, sizes: Sequence[Sequence[int]] = SIZES,
    ) -> None:  # fmt: skip
        self._config, self._fmt, self._steps_per_epoch = config, fmt, steps_per_epoch
        self._sizes = tuple((int(height), int(width)) for height, width in sizes)
        self._by_turns: ByTurns[tuple[Stage, int], PackedBatch] | None = None
        self.artwork = artwork if isinstance(artwork, Artwork) else load_artwork(Path(artwork) if artwork else None)

    def prepare_stage(self, stage: Stage) -> None:
        unknown = sorted(set(stage.dataset_weights or ()) - set(KINDS))
        if unknown:
            raise ConfigError(
                "a stage mixes kinds of scenes that there are not", value=", ".join(unknown), allowed=", ".join(KINDS),
                fix="Name some of these in dataset_weights", param="curriculum_training.stages",
            )  # fmt: skip
        if stage.loss_weights.get("language", 1.0) and (stage.dataset_weights or {}).get("page"):
            raise ConfigError(
                "a stage that asks questions mixes in pages, about which there is none", value="page",
                allowed=", ".join(kind for kind in KINDS if kind != "page"),
                fix="Leave page out of dataset_weights, or give loss_weights.language 0",
                param="curriculum_training.stages",
            )  # fmt: skip
        steps = stage.steps or stage.epochs * self._steps_per_epoch
        most = _SEEDS_OF_STAGE // (self._seeds_of_pack * self._config.gradient_accumulation_steps)
        if steps > most:  # the next ones are another stage's, and at last those of the scores
            raise ConfigError(
                "a stage has more steps than there are scenes for it", value=f"{steps} steps", allowed=f"{most} steps",
                fix="Make two stages of it, or lower batch_size or gradient_accumulation_steps",
                param="curriculum_training.stages",
            )  # fmt: skip

    @property
    def _seeds_of_pack(self) -> int:
        return max(256, self._config.batch_size)

    def num_steps(self, stage: Stage, epoch: int) -> int:  # noqa: ARG002 - every epoch is as long
        return self._steps_per_epoch

    def steps(self, stage: Stage, epoch: int, *, first: int = 0) -> Iterator[list[PackedBatch]]:
        size = self._config.gradient_accumulation_steps
        begin = epoch * self._steps_per_epoch
        numbers = range((begin + first) * size, (begin + self._steps_per_epoch) * size)
        made = self._made([(stage, number) for number in numbers])
        for _ in range(first, self._steps_per_epoch):
            yield [next(made) for _ in range(size)]

    def _made(self, asked: Sequence[tuple[Stage, int]]) -> Iterator[PackedBatch]:
        """Ahead of the steps where an accelerator computes them, by turns with them where the cores do."""
        workers = self._config.num_workers
        if workers == 0 or LoadOptions(device=self._config.device).resolve_device().type != "cpu":
            return in_order(self._pack_of, asked, workers)
        if self._by_turns is None:
            self._by_turns = ByTurns(self._pack_of, workers)
        return self._by_turns.in_order(asked)

    def make_one_size(self) -> None:
        """From now on packs have the size nearest to the mean of all, for who times a few steps."""
        areas = {size: size[0] * size[1] for size in self._sizes}
        mean = sum(areas[size] for size in self._sizes) / len(self._sizes)
        self._sizes = (min(areas, key=lambda size: abs(areas[size] - mean)),)

    def close(self) -> None:
        """End the processes that make packs, if there are any; whoever asks for more gets new ones."""
        if self._by_turns is not None:
            self._by_turns.close()
            self._by_turns = None

    def _pack_of(self, asked: tuple[Stage, int]) -> PackedBatch:
        return self.pack(*asked)

    def pack(self, stage: Stage, number: int) -> PackedBatch:
        """Pack `number` of a stage, counted over its epochs."""
        count = self._config.batch_size
        base = ((self._config.seed * 8 + stage.index) % 2**14) * _SEEDS_OF_STAGE + number * self._seeds_of_pack
        rng = random.Random(base)
        size = rng.choice(self._sizes)
        mix = stage.dataset_weights
        kinds: list[str | None] = [None] * count
        if mix is not None:
            kinds = list(rng.choices(KINDS, [mix.get(kind, 0.0) for kind in KINDS], k=count))
        scenes = [make_scene(base + i, self.artwork, size, kind) for i, kind in enumerate(kinds)]
        grid = (1, size[0] // self._fmt.patches.patch_size, size[1] // self._fmt.patches.patch_size)
        row = scene_row if stage.loss_weights.get("language", 1.0) else blank_row
        return self._collate([row(scene, rng, grid, self._fmt) for scene in scenes], scenes, base, grid)

    def _collate(
        self, rows: Sequence[Row], scenes: Sequence[Scene], base: int, grid: tuple[int, int, int]
    ) -> PackedBatch:
        labels = torch.tensor([label for row in rows for label in row.labels])
        lengths = tuple(len(row.ids) for row in rows)
        if sum(lengths) > self._config.max_tokens:
            raise ConfigError(
                "the scenes of a pack are longer than a pack may be", value=f"{sum(lengths)} tokens",
                allowed=f"max_tokens, {self._config.max_tokens}", fix="Raise max_tokens or lower batch_size",
                param="max_tokens",
            )  # fmt: skip
        return PackedBatch(
            input_ids=torch.tensor([token for row in rows for token in row.ids]),
            labels=labels,
            position_ids=torch.cat([row.positions for row in rows], dim=1),
            sample_lengths=lengths,
            pixels=np.concatenate([patches(scene.image, self._fmt) for scene in scenes]),
            grids=(grid,) * len(rows),
            images_per_sample=(1,) * len(rows),
            samples=tuple(SampleRef(f"{s.kind}:{base + i}", s.kind, base + i) for i, s in enumerate(scenes)),
            num_label_tokens=int((labels != -100).sum()),
            blocks=torch.tensor([block for row in rows for block in row.blocks]),
            label_weights=answer_weights(labels),
            targets={name: _cells(read, scenes) for name, read in TARGETS.items()},
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self._steps_per_epoch, self._sizes, KINDS]).encode()).hexdigest()[:16]

    def quarantine_report(self) -> list[dict[str, Any]]:
        return []

    def conversation(self, ref: SampleRef) -> list[ChatMessage]:
        raise ConfigError(
            "scenes are scored by `dve demo eval`, not in the run", value=ref.key, allowed="evaluation.num_answers 0",
            fix="Set evaluation.num_answers to 0", param="evaluation.num_answers",
        )  # fmt: skip


def _cells(read: Callable[[Scene], np.ndarray], scenes: Sequence[Scene]) -> Tensor:
    """(cells of all scenes, ...)."""
    found = [read(scene) for scene in scenes]
    return torch.from_numpy(np.concatenate([one.reshape(-1, *one.shape[2:]) for one in found]))


def patches(image: np.ndarray, fmt: InputFormat) -> np.ndarray:
    """(H, W, 3) uint8 -> (h*w, 3*2*14*14) uint8 in Qwen's order: merged cells first, then within a cell."""
    size, merge = fmt.patches.patch_size, fmt.patches.merge_size
    h, w = image.shape[0] // size, image.shape[1] // size
    x = image.reshape(h // merge, merge, size, w // merge, merge, size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    x = x.reshape(h * w, 3, 1, size, size)
    return np.ascontiguousarray(np.broadcast_to(x, (h * w, 3, fmt.patches.temporal_patch_size, size, size))).reshape(
        h * w, -1
    )
