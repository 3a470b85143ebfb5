"""Conversations and their pictures as what the model takes; training and prefill share it.

In: ChatMessages (bytes, PIL images, data URLs, paths if allowed); out: `ModelInputs` of one sequence.
Pixels stay uint8 until they are on the device. Runs no model.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_core.errors import ContextLengthError
from model_core.language.rope import MropeLayout, mrope_positions
from model_core.processing.chat import EncodedChat, SpecialIds, encode_chat, expand_placeholders
from model_core.processing.images import ImageLimits, Patches, PatchSpec
from model_core.processing.media import Clock, MediaReport, no_clock, open_media
from model_core.types import ChatMessage, ImagePart, TextPart, VideoPart
from model_core.vision_tokens import Grid


@dataclass(frozen=True, slots=True)
class InputFormat:
    """What turning messages into inputs depends on; all of it comes from the checkpoint folder."""

    tokenizer: Any
    special: SpecialIds
    patches: PatchSpec
    mrope: MropeLayout
    limits: ImageLimits = field(default_factory=ImageLimits)
    allow_paths: bool = False

    @classmethod
    def of(cls, processor: Any, mrope: MropeLayout) -> InputFormat:
        """What a DualVisionProcessor says, for the model whose layout this is."""
        return cls(processor.tokenizer, processor.special, processor.patch_spec, mrope)


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One sequence. grids: PATCH grids in the order of the placeholders, images and videos alike.

    pixels: (sum t*h*w, 3*f*p*p) uint8; positions: (3, T); the next token's position is T + delta.
    spans: (first, end, key) of each image's placeholders. Equal keys mean equal tokens at the input of the encoders
    and equal spacing of the positions, whatever file they came from.
    """

    input_ids: list[int]
    token_types: list[int]
    pixels: np.ndarray | None
    grids: tuple[Grid, ...]
    positions: Tensor
    delta: int
    warnings: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[int, int, bytes], ...] = ()
    media: MediaReport = field(default_factory=MediaReport)

    @property
    def num_image_tokens(self) -> int:
        return sum(1 for kind in self.token_types if kind)


def prepare_inputs(
    messages: Sequence[ChatMessage],
    fmt: InputFormat,
    max_context: int | None = None,
    suffix_ids: Sequence[int] = (),
    *,
    clock: Clock = no_clock,
) -> ModelInputs:
    """Decode, resize, tokenise and place. What the headers say is checked before any pixel is decoded.

    Args:
        max_context: most tokens that prompt and suffix may have together.
        suffix_ids: ids put behind the prompt as they are (an answer to be scored).
    Raises:
        InputError: anything about the messages or the pictures; ContextLengthError with the counts.
    """
    chat = encode_chat(fmt.tokenizer, messages)
    num_text = len(chat.ids) - len(chat.media) + len(suffix_ids)

    def check(grids: Sequence[Grid]) -> None:
        num_image = sum(num_vision_tokens(grid, fmt) for grid in grids)
        _check_context(num_text, num_image, max_context)

    placed = place_media(chat, messages, fmt, check, suffix_ids, clock=clock)
    return ModelInputs(
        input_ids=placed.input_ids,
        token_types=placed.token_types,
        pixels=np.concatenate([p.pixels for p in placed.patches]) if placed.patches else None,
        grids=tuple(p.grid for p in placed.patches),
        positions=placed.positions,
        delta=placed.delta,
        warnings=placed.media.warnings,
        spans=_spans(placed, chat.media),
        media=placed.media,
    )


@dataclass(frozen=True, slots=True)
class PlacedMedia:
    """A conversation with its media decoded and its placeholders expanded; counts: vision tokens of each medium."""

    input_ids: list[int]
    token_types: list[int]
    patches: list[Patches]
    counts: list[int]
    positions: Tensor
    delta: int
    media: MediaReport


def place_media(
    chat: EncodedChat,
    messages: Sequence[ChatMessage],
    fmt: InputFormat,
    check: Callable[[Sequence[Grid]], None],
    suffix_ids: Sequence[int] = (),
    *,
    clock: Clock = no_clock,
) -> PlacedMedia:
    """The part of preparing that prefill and training share. `check` gets the grids before anything is decoded."""
    patches, media = open_media(
        named_media(chat, messages), fmt.patches, fmt.limits, allow_paths=fmt.allow_paths,
        tokens_per_cell=fmt.mrope.tokens_per_cell, check=check, clock=clock,
    )  # fmt: skip
    counts = [num_vision_tokens(p.grid, fmt) for p in patches]
    ids, types = expand_placeholders(chat.ids, counts, fmt.special)
    ids, types = ids + list(suffix_ids), types + [0] * len(suffix_ids)
    images = [p.grid for p, part in zip(patches, chat.media, strict=True) if isinstance(part, ImagePart)]
    videos = [(p.grid, part) for p, part in zip(patches, chat.media, strict=True) if isinstance(part, VideoPart)]
    seconds = [fmt.patches.temporal_patch_size / part.fps for _, part in videos]
    positions, delta = mrope_positions(types, images, [grid for grid, _ in videos], seconds, fmt.mrope)
    return PlacedMedia(ids, types, patches, counts, positions, delta, media)


def named_media(chat: EncodedChat, messages: Sequence[ChatMessage]) -> list[tuple[str, ImagePart | VideoPart]]:
    """Each medium with the name of its place in the messages, for errors."""
    places = [
        f"messages[{m}].content[{i}]"
        for m, message in enumerate(messages)
        for i, part in enumerate(message.parts)
        if not isinstance(part, TextPart)
    ]
    return list(zip(places, chat.media, strict=True))


def _check_context(num_text: int, num_image: int, max_context: int | None) -> None:
    if max_context is not None and num_text + num_image > max_context:
        raise ContextLengthError(
            "the prompt does not fit the context",
            value=f"{num_text + num_image} tokens ({num_text} text, {num_image} image)",
            allowed=f"{max_context} tokens",
            fix="Shorten the conversation, or send fewer or smaller images",
            param="messages",
        )


def _spans(placed: PlacedMedia, media: Sequence[ImagePart | VideoPart]) -> tuple[tuple[int, int, bytes], ...]:
    places = [i for i, kind in enumerate(placed.token_types) if kind]
    found, at = [], 0
    for count, one, part in zip(placed.counts, placed.patches, media, strict=True):
        found.append((places[at], places[at + count - 1] + 1, _image_key(one, part)))
        at += count
    return tuple(found)


def _image_key(patches: Patches, part: ImagePart | VideoPart) -> bytes:
    """Of the patches as the encoders get them: turning, resizing and colour rules are in it for certain."""
    spacing = part.fps if isinstance(part, VideoPart) else 0.0
    digest = hashlib.blake2b(struct.pack("<3qd", *patches.grid, spacing), digest_size=16)
    digest.update(np.ascontiguousarray(patches.pixels).data)
    return digest.digest()


def num_vision_tokens(grid: Grid, fmt: InputFormat) -> int:
    """Fused tokens of a medium with this patch grid."""
    t, h, w = grid
    return t * h * w // fmt.mrope.merge_size**2 * fmt.mrope.tokens_per_cell


def normalise_pixels(pixels: np.ndarray, spec: PatchSpec, device: torch.device) -> Tensor:
    """uint8 patches (N, 3*f*p*p), uploaded as they are, as CLIP-normalised float32 on the device.

    Each of the 256 values of a channel is worked out once, rescaled in float64 and normalised in float32 as the
    processor's numpy does it, bit for bit; the pixels then look theirs up.
    """
    unit = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
    mean, std = (torch.tensor(x, dtype=torch.float32)[:, None] for x in (spec.image_mean, spec.image_std))
    table = ((unit - mean) / std).to(device)  # (3, 256)
    values = torch.from_numpy(pixels).to(device).view(len(pixels), 3, -1)
    out = torch.empty(values.shape, device=device)
    for channel in range(3):
        out[:, channel] = table[channel][values[:, channel].int()]
    return out.view(len(pixels), -1)
