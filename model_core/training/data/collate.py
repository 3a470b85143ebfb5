"""Conversations -> tensors -> one pack.

In: samples of data sets; out: `PackedBatch`. It is the training half of `processing/batch.py`: the same ids, positions
and patches as prefill makes, and the labels, which only training needs. It knows no order and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_core.errors import RecordError
from model_core.processing.batch import InputFormat, num_vision_tokens, place_media
from model_core.processing.chat import EncodedChat, SpecialIds, answer_labels, encode_chat
from model_core.training.data.datasets import Sample
from model_core.training.data.packs import PackedBatch, SampleRef
from model_core.vision_tokens import Grid

IGNORED = -100


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample as tensors; the letters are those of PackedBatch."""

    input_ids: list[int]
    labels: list[int]
    position_ids: Tensor
    pixels: list[np.ndarray]
    grids: list[Grid]


def encode_sample(sample: Sample, fmt: InputFormat, max_tokens: int) -> EncodedSample:
    """Decode, place, label.

    Raises:
        InputError: a picture or text that can't be used. RecordError: too long, or without a label.
    """
    chat = encode_chat(fmt.tokenizer, sample.messages, add_generation_prompt=False)
    labels = trained_labels(chat, sample, fmt.special)

    def check(grids: Sequence[Grid]) -> None:
        check_length(chat, labels, [num_vision_tokens(grid, fmt) for grid in grids], max_tokens)

    placed = place_media(chat, sample.messages, fmt, check)
    return EncodedSample(
        placed.input_ids,
        expand_labels(labels, chat.ids, placed.counts, fmt.special),
        placed.positions,
        [one.pixels for one in placed.patches],
        [one.grid for one in placed.patches],
    )


def trained_labels(chat: EncodedChat, sample: Sample, special: SpecialIds) -> list[int]:
    """Labels before expansion: of the assistant's turns, less those that are not to be trained on."""
    roles = ["assistant" if is_trained else "silent" for is_trained in sample.trained]
    return answer_labels(chat, roles, special)


def check_length(chat: EncodedChat, labels: Sequence[int], counts: Sequence[int], max_tokens: int) -> int:
    """Tokens of the sample with its placeholders expanded. Raises RecordError: too many, or no label among them."""
    length = len(chat.ids) - len(counts) + sum(counts)
    if length > max_tokens:
        raise RecordError(
            "too_long", "the sample does not fit a pack, and is never cut",
            value=f"{length} tokens, {sum(counts)} of them of images", allowed=f"max_tokens, {max_tokens}",
            fix="Raise max_tokens, split the conversation, or use smaller images",
        )  # fmt: skip
    if not count_labels(labels):
        raise RecordError(
            "no_label_tokens", "no token of the sample is a label", value=f"0 of {length} tokens",
            allowed="an answer with words", fix="Write the answer, or leave the row out",
        )  # fmt: skip
    return length


def count_labels(labels: Sequence[int]) -> int:
    """Labels that something predicts: all but one at the first place."""
    rest = list(labels[1:])
    return len(rest) - rest.count(IGNORED)


def expand_labels(labels: Sequence[int], ids: Sequence[int], counts: Sequence[int], special: SpecialIds) -> list[int]:
    """Labels (T,) for ids whose placeholders are repeated as often as their media have tokens."""
    out: list[int] = []
    begin = 0
    places = [i for i, token in enumerate(ids) if token in (special.image, special.video)]
    for place, count in zip(places, counts, strict=True):
        out += labels[begin:place]
        out += [IGNORED] * count
        begin = place + 1
    return out + list(labels[begin:])


def pack(refs: Sequence[SampleRef], samples: Sequence[EncodedSample]) -> PackedBatch:
    """Samples behind one another, each with positions from 0."""
    pixels = [one for sample in samples for one in sample.pixels]
    return PackedBatch(
        input_ids=torch.tensor([token for sample in samples for token in sample.input_ids]),
        labels=torch.tensor([label for sample in samples for label in sample.labels]),
        position_ids=torch.cat([sample.position_ids for sample in samples], dim=1),
        sample_lengths=tuple(len(sample.input_ids) for sample in samples),
        pixels=np.concatenate(pixels) if pixels else None,
        grids=tuple(grid for sample in samples for grid in sample.grids),
        images_per_sample=tuple(len(sample.grids) for sample in samples),
        samples=tuple(refs),
        num_label_tokens=sum(count_labels(sample.labels) for sample in samples),
    )
