"""A scene's questions as one row of tokens: several that can't see each other behind one picture, or a conversation.

In: a scene, a random generator, the patch grid and the InputFormat; out: ids, labels, blocks and positions. It draws
no picture and knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.demo.questions import ask
from model_core.demo.scenes import Scene
from model_core.language.rope import mrope_positions
from model_core.processing.batch import InputFormat
from model_core.processing.chat import answer_labels, encode_chat, expand_placeholders
from model_core.types import ChatMessage, ImagePart, Part, TextPart
from model_core.vision_tokens import Grid

CONVERSATION_SHARE = 0.15
MAX_QUESTIONS = 4
SYSTEM_SHARE = 0.1
#: Of the questions in training, how many are in capitals, each a word spelt letter by letter: few ask so, but of those
#: that did two in five were answered wrongly.
CAPITALS_SHARE = 0.1
SYSTEM_PROMPTS = (
    "You are a careful assistant.",
    "Answer briefly.",
    "You answer questions about pictures.",
    "Be precise and short.",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence. blocks: 0 what all may see, n question n, which sees that and itself."""

    ids: list[int]
    labels: list[int]
    blocks: list[int]
    positions: Tensor


def scene_row(scene: Scene, rng: random.Random, grid: Grid, fmt: InputFormat) -> Row:
    """Most scenes: several questions that can't see each other. Some: a conversation.

    In a conversation an earlier answer often holds a later one's, so that it can be copied without looking; a model
    trained on conversations alone learnt just that, and asked alone it guessed.
    """
    image = ImagePart(None)
    if rng.random() < CONVERSATION_SHARE:
        messages = _system(rng)
        for i, turn in enumerate(ask(scene, rng, limit=2)):
            question = TextPart(turn.question)
            parts: tuple[Part, ...] = (question,)
            if i == 0:  # clients put the picture before the question or after it
                parts = (image, question) if rng.random() < 0.5 else (question, image)
            messages += [ChatMessage("user", parts), ChatMessage("assistant", (TextPart(turn.answer),))]
        return _encode(messages, grid, fmt)
    system = _system(rng)
    rows = [
        _encode(
            [
                *system,
                ChatMessage("user", (image, TextPart(_typed(rng, turn.question)))),
                ChatMessage("assistant", (TextPart(turn.answer),)),
            ],
            grid,
            fmt,
        )
        for turn in ask(scene, rng, limit=MAX_QUESTIONS)
    ]
    return _joined(rows, fmt.special.image)


def _joined(rows: Sequence[Row], image: int) -> Row:
    """Questions behind what they share: everything up to <|vision_end|> is the same in all of them."""
    shared = len(rows[0].ids) - rows[0].ids[::-1].index(image) + 1
    joined = Row(rows[0].ids[:shared], [-100] * shared, [0] * shared, rows[0].positions[:, :shared])
    for number, row in enumerate(rows, start=1):
        joined = Row(
            joined.ids + row.ids[shared:],
            joined.labels + row.labels[shared:],
            joined.blocks + [number] * (len(row.ids) - shared),
            torch.cat([joined.positions, row.positions[:, shared:]], dim=1),
        )
    return joined


def blank_row(scene: Scene, rng: random.Random, grid: Grid, fmt: InputFormat) -> Row:  # noqa: ARG001 - as scene_row
    """The picture alone, for stages that ask nothing."""
    count = grid[1] * grid[2] // fmt.patches.merge_size**2
    return Row([fmt.special.image] * count, [-100] * count, [0] * count, torch.zeros(3, count, dtype=torch.long))


def answer_weights(labels: Tensor) -> Tensor:
    """(S,): 1 / sqrt(n) for each of the n labels of one answer, 0 where there is no label (-100).

    An answer of n tokens weighs sqrt(n), not n: or descriptions, the longest answers, would drown the one token of a
    yes.
    """
    weights = torch.zeros(labels.shape)
    is_label = torch.cat([torch.tensor([False]), labels != -100, torch.tensor([False])])
    change = (is_label[1:] != is_label[:-1]).nonzero().flatten().tolist()
    for begin, end in zip(change[::2], change[1::2], strict=True):
        weights[begin:end] = (end - begin) ** -0.5
    return weights


def _typed(rng: random.Random, question: str) -> str:
    return question.upper() if rng.random() < CAPITALS_SHARE else question


def _system(rng: random.Random) -> list[ChatMessage]:
    if rng.random() >= SYSTEM_SHARE:
        return []
    return [ChatMessage("system", (TextPart(rng.choice(SYSTEM_PROMPTS)),))]


def _encode(messages: Sequence[ChatMessage], grid: Grid, fmt: InputFormat) -> Row:
    chat = encode_chat(fmt.tokenizer, messages, add_generation_prompt=False)
    labels = answer_labels(chat, [m.role for m in messages], fmt.special)
    count = grid[1] * grid[2] // fmt.patches.merge_size**2
    ids, types = expand_placeholders(chat.ids, [count], fmt.special)
    at = chat.ids.index(fmt.special.image)
    labels = labels[:at] + [-100] * count + labels[at + 1 :]
    return Row(ids, labels, [0] * len(ids), mrope_positions(types, [grid], [], [], fmt.mrope)[0])
