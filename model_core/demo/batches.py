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
from model_core.demo.questions import ask
from model_core.demo.recipe import Recipe, Stage
from model_core.demo.scenes import KINDS, make_scene
from model_core.language.rope import MropeLayout, mrope_positions
from model_core.processing.chat import SpecialIds, answer_labels, encode_chat, expand_placeholders
from model_core.types import ChatMessage, ImagePart, Part, TextPart

PATCH, MERGE = 14, 2
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """images: (B, H, W, 3) uint8; cells: (B, gh, gw, ...) int64 labels; the rest as the model takes it."""

    images: Tensor
    cell_class: Tensor
    cell_colour: Tensor
    cell_letters: Tensor
    input_ids: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None
    attention_mask: Tensor | None

    def pixel_values(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Patches (B*h*w, 1176) in Qwen's order and grids (B, 3), normalised on the device."""
        x = self.images.to(device).permute(0, 3, 1, 2).float().div_(255)
        x = (x - _MEAN.to(device)) / _STD.to(device)
        b, _, height, width = x.shape
        h, w = height // PATCH, width // PATCH
        x = x.view(b, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
        x = x.reshape(b * h * w, 3, 1, PATCH, PATCH).expand(-1, -1, 2, -1, -1).reshape(b * h * w, -1)
        return x, torch.tensor([[1, h, w]] * b)


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
        cells = [
            torch.from_numpy(np.stack([getattr(s, name) for s in scenes]).astype(np.int64))
            for name in ("cell_class", "cell_colour", "cell_letters")
        ]
        images = torch.from_numpy(np.stack([np.asarray(s.image) for s in scenes]))
        text = self._text(scenes, rng, size) if self.stage.answer_weight else (None, None, None, None)
        return Batch(images, *cells, *text)

    def _text(self, scenes: list[Any], rng: random.Random, size: tuple[int, int]) -> tuple[Tensor, ...]:
        grid = (1, size[0] // PATCH, size[1] // PATCH)
        rows = [self._conversation(scene, rng, grid) for scene in scenes]
        length = max(len(ids) for ids, _, _ in rows)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), length), pad)
        labels = torch.full((len(rows), length), -100)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, (ids, row_labels, types) in enumerate(rows):
            n = len(ids)
            input_ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(ids), torch.tensor(row_labels), 1
            positions[:, i, :n] = mrope_positions(types, [grid], [], [], self.layout)[0]
        return input_ids, labels, positions, mask

    def _conversation(self, scene: Any, rng: random.Random, grid: tuple[int, int, int]) -> tuple[list[int], ...]:
        messages = []
        for i, turn in enumerate(ask(scene, rng, limit=5)):
            question = TextPart(turn.question)
            parts: tuple[Part, ...] = (question,)
            if i == 0:
                # Clients put the picture before or after the question; most before.
                parts = (ImagePart(None), question) if rng.random() < 0.8 else (question, ImagePart(None))
            messages += [ChatMessage("user", parts), ChatMessage("assistant", (TextPart(turn.answer),))]
        if rng.random() < 0.1:
            messages.insert(0, ChatMessage("system", (TextPart(rng.choice(SYSTEM_PROMPTS)),)))
        chat = encode_chat(self.tokenizer, messages, add_generation_prompt=False)
        labels = answer_labels(chat, [m.role for m in messages], self.special)
        count = grid[1] * grid[2] // MERGE**2
        ids, types = expand_placeholders(chat.ids, [count], self.special)
        at = chat.ids.index(self.special.image)
        return ids, labels[:at] + [-100] * count + labels[at + 1 :], types


SYSTEM_PROMPTS = (
    "You are a careful assistant.",
    "Answer briefly.",
    "You answer questions about pictures.",
    "Be precise and short.",
)
