"""What the trainer gets from the data: packs of whole samples, and the source that gives them step by step.

A pack is one forward pass: up to `batch_size` samples and at most `max_tokens` tokens, placeholders expanded. It knows
no file, no format and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from model_core.training.config import Stage
from model_core.types import ChatMessage
from model_core.vision_tokens import Grid


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Which sample: `key` is "dataset:index" and stays the same over epochs and runs."""

    key: str
    dataset: str
    index: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Samples one behind the other; none may see another.

    input_ids, labels: (S,) long. A label is the token at its own place (not shifted) or -100; only the assistant's
        words and the end of its turns have one.
    position_ids: (3, S) long, multimodal rotary positions, each sample from 0.
    pixels: (P, 3*f*p*p) uint8 patches of all images in order, or None; `normalise_pixels` makes them values.
    grids: patch grids (t, h, w), one an image, in the order of the placeholders.
    num_label_tokens: labels that are trained on: all but those at a sample's first place, which nothing predicts.
    blocks: (S,) long; parts of a sample that can't see each other, as `packed_hidden` takes them.
    label_weights: (S,) float; how much each label counts. None: 1.
    targets: what a source tells an auxiliary loss of these samples, by names of their own.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    sample_lengths: tuple[int, ...]
    pixels: np.ndarray | None
    grids: tuple[Grid, ...]
    images_per_sample: tuple[int, ...]
    samples: tuple[SampleRef, ...]
    num_label_tokens: int
    blocks: Tensor | None = None
    label_weights: Tensor | None = None
    targets: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class BatchSource(Protocol):
    """Packs in an order that depends on nothing but seed, stage and epoch, the same at any number of processes."""

    @property
    def dataset_names(self) -> tuple[str, ...]: ...

    def prepare_stage(self, stage: Stage) -> None:
        """Take the stage's weights. Raises ConfigError where they leave no data."""

    def num_steps(self, stage: Stage, epoch: int) -> int:
        """Optimizer steps of an epoch."""

    def steps(self, stage: Stage, epoch: int, *, first: int = 0) -> Iterator[list[PackedBatch]]:
        """This process's packs of each step from `first` on; nothing before it is opened or decoded.

        A list holds up to `gradient_accumulation_steps` packs; in an epoch's last step it may be shorter, or empty.
        Raises DataError for a bad sample under `fail`, or past the budget under `quarantine`.
        """

    def fingerprint(self) -> str:
        """Of files, weights and lengths: a resume on other data is refused by it."""

    def quarantine_report(self) -> list[dict[str, Any]]:
        """Bad samples that were set aside so far: `RowProblem.to_json` of each.

        A source may have `problems` too, of the same form: all that it found beforehand, warnings and notes included.
        And `quarantine_state`, what a checkpoint keeps of samples that went bad in the run, as a list of JSON objects,
        with `restore_quarantine`, which gets that list in a resumed run, before `fingerprint` is asked.
        """

    def conversation(self, ref: SampleRef) -> list[ChatMessage]:
        """The messages of a sample, its answers included, for generating one to it; pictures are still lazy."""
