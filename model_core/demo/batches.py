"""Scenes and their conversations as training batches: a pure function of (recipe seed, stage, step).

That is what makes a build resumable without saving any generator: step n is the same batch whenever
it is asked for, in whichever process.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model_core.demo.artwork import Artwork
from model_core.demo.labels import cell_counts, cell_middles, cell_places
from model_core.demo.questions import ask
from model_core.demo.recipe import Recipe, Stage
from model_core.demo.scenes import KINDS, make_scene
from model_core.language.rope import MropeLayout, mrope_positions
from model_core.processing.chat import SpecialIds, answer_labels, encode_chat, expand_placeholders
from model_core.types import ChatMessage, ImagePart, Part, TextPart

PATCH, MERGE = 14, 2
CONVERSATION_SHARE = 0.15
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """images: (B, H, W, 3) uint8; cells: {what: (B, gh, gw, ...)}, int64 but for places; the rest goes to the model.

    weights: (B, T) of each label. An answer of n tokens weighs sqrt(n), not n: or descriptions, the longest answers,
    would drown the one token of a yes.
    """

    images: Tensor
    cells: dict[str, Tensor]
    input_ids: Tensor | None
    labels: Tensor | None
    weights: Tensor | None
    position_ids: Tensor | None
    blocks: Tensor | None

    def may_attend(self, device: torch.device) -> Tensor:
        """(B, 1, T, T): causal, and a question sees no other question. Padding sees itself, to stay finite."""
        blocks = self.blocks.to(device)
        query, key = blocks[:, :, None], blocks[:, None, :]
        causal = torch.ones(blocks.shape[1], blocks.shape[1], dtype=torch.bool, device=device).tril()
        seen = causal & (key >= 0) & ((key == 0) | (key == query))
        return (seen | torch.eye(blocks.shape[1], dtype=torch.bool, device=device))[:, None]

    def pixel_values(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Patches (B*h*w, 1176) in Qwen's order and grids (B, 3), normalised on the device."""
        x = self.images.to(device).permute(0, 3, 1, 2).float().div_(255)
        x = (x - _MEAN.to(device)) / _STD.to(device)
        b, _, height, width = x.shape
        h, w = height // PATCH, width // PATCH
        x = x.view(b, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
        x = x.reshape(b * h * w, 3, 1, PATCH, PATCH).expand(-1, -1, 2, -1, -1).reshape(b * h * w, -1)
        return x, torch.tensor([[1, h, w]] * b)


_CELLS = {
    "class": lambda scene: scene.cell_class.astype(np.int64),
    "colour": lambda scene: scene.cell_colour.astype(np.int64),
    "letters": lambda scene: scene.cell_letters.astype(np.int64),
    "spots": lambda scene: scene.cell_spots.astype(np.int64),
    "counts": lambda scene: cell_counts(scene).astype(np.int64),
    "middles": lambda scene: cell_middles(scene).astype(np.int64),
    "places": cell_places,
}


def answer_weights(labels: Tensor) -> Tensor:
    """(T,): 1 / sqrt(n) for each of the n labels of one answer, 0 where there is no label (-100)."""
    weights = torch.zeros(labels.shape)
    is_label = torch.cat([torch.tensor([False]), labels != -100, torch.tensor([False])])
    change = (is_label[1:] != is_label[:-1]).nonzero().flatten().tolist()
    for begin, end in zip(change[::2], change[1::2], strict=True):
        weights[begin:end] = (end - begin) ** -0.5
    return weights


class SceneBatches(Dataset):
    """Batch number `step` of a stage. Training seeds stay below 2**40; held-out seeds start there."""

    def __init__(self, recipe: Recipe, stage_index: int, artwork: Artwork, tokenizer: Any, layout: MropeLayout) -> None:
        self.recipe, self.stage_index, self.artwork = recipe, stage_index, artwork
        self.tokenizer, self.layout = tokenizer, layout
        self.special = SpecialIds.from_tokenizer(tokenizer)

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.stage_index]

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> Batch:
        base = ((self.recipe.seed * 8 + self.stage_index) % 2**14) * 2**26 + step * 256
        rng = random.Random(base)
        size = rng.choice(self.recipe.sizes)
        shares = self.stage.kinds
        kinds = rng.choices(KINDS, shares, k=self.stage.batch_size) if shares else [None] * self.stage.batch_size
        scenes = [make_scene(base + i, self.artwork, size, kind) for i, kind in enumerate(kinds)]
        cells = {name: torch.from_numpy(np.stack([read(s) for s in scenes])) for name, read in _CELLS.items()}
        images = torch.from_numpy(np.stack([np.asarray(s.image) for s in scenes]))
        text = self._text(scenes, rng, size) if self.stage.answer_weight else (None, None, None, None, None)
        return Batch(images, cells, *text)

    def _text(self, scenes: list[Any], rng: random.Random, size: tuple[int, int]) -> tuple[Tensor, ...]:
        grid = (1, size[0] // PATCH, size[1] // PATCH)
        rows = [self._row(scene, rng, grid) for scene in scenes]
        length = max(len(row.ids) for row in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        weights = torch.zeros(len(rows), length)
        blocks = torch.full((len(rows), length), -1)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row.ids)
            input_ids[i, :n], labels[i, :n] = torch.tensor(row.ids), torch.tensor(row.labels)
            weights[i, :n] = answer_weights(labels[i, :n])
            blocks[i, :n], positions[:, i, :n] = torch.tensor(row.blocks), row.positions
        return input_ids, labels, weights, positions, blocks

    def _row(self, scene: Any, rng: random.Random, grid: tuple[int, int, int]) -> _Row:
        """Most scenes: several questions that can't see each other, behind one picture. Some: a conversation.

        In a conversation an earlier answer often holds a later one's, so that it can be copied without
        looking; a model trained on conversations alone learnt just that, and asked alone it guessed.
        """
        image = ImagePart(None)
        if rng.random() < CONVERSATION_SHARE:
            messages = []
            for i, turn in enumerate(ask(scene, rng, limit=2)):
                question = TextPart(turn.question)
                parts: tuple[Part, ...] = (question,)
                if i == 0:  # clients put the picture before the question or after it
                    parts = (image, question) if rng.random() < 0.5 else (question, image)
                messages += [ChatMessage("user", parts), ChatMessage("assistant", (TextPart(turn.answer),))]
            return self._encode(messages, rng, grid)
        system = self._system(rng)
        rows = [
            self._encode(
                [
                    *system,
                    ChatMessage("user", (image, TextPart(turn.question))),
                    ChatMessage("assistant", (TextPart(turn.answer),)),
                ],
                None,
                grid,
            )
            for turn in ask(scene, rng, limit=6)
        ]
        # Everything up to <|vision_end|> is the same in all of them.
        shared = len(rows[0].ids) - rows[0].ids[::-1].index(self.special.image) + 1
        packed = _Row(rows[0].ids[:shared], [-100] * shared, [0] * shared, rows[0].positions[:, :shared])
        for number, row in enumerate(rows, start=1):
            tail = len(row.ids) - shared
            packed = _Row(
                packed.ids + row.ids[shared:],
                packed.labels + row.labels[shared:],
                packed.blocks + [number] * tail,
                torch.cat([packed.positions, row.positions[:, shared:]], dim=1),
            )
        return packed

    def _system(self, rng: random.Random) -> list[ChatMessage]:
        return [ChatMessage("system", (TextPart(rng.choice(SYSTEM_PROMPTS)),))] if rng.random() < 0.1 else []

    def _encode(self, messages: list[ChatMessage], rng: random.Random | None, grid: tuple[int, int, int]) -> _Row:
        messages = [*(self._system(rng) if rng is not None else []), *messages]
        chat = encode_chat(self.tokenizer, messages, add_generation_prompt=False)
        labels = answer_labels(chat, [m.role for m in messages], self.special)
        count = grid[1] * grid[2] // MERGE**2
        ids, types = expand_placeholders(chat.ids, [count], self.special)
        at = chat.ids.index(self.special.image)
        labels = labels[:at] + [-100] * count + labels[at + 1 :]
        return _Row(ids, labels, [0] * len(ids), mrope_positions(types, [grid], [], [], self.layout)[0])


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence. blocks: 0 what all may see, n question n, which sees that and itself."""

    ids: list[int]
    labels: list[int]
    blocks: list[int]
    positions: Tensor


SYSTEM_PROMPTS = (
    "You are a careful assistant.",
    "Answer briefly.",
    "You answer questions about pictures.",
    "Be precise and short.",
)
