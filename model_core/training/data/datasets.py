"""Data sets as the original has them: a file in, conversations with pictures that are not opened yet out.

`format_conversations` is meant to be overridden: it says what the turns and pictures of a row look like as messages.
What comes of it is judged here, so that nothing that can't be trained on goes further. It decodes and draws nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from model_core.errors import DataError, InputError, RecordError
from model_core.processing.sources import LazyImage
from model_core.training.data.formats import read_record
from model_core.training.data.keys import near_keys
from model_core.training.data.opening import open_data
from model_core.training.data.stores import Store, StoredImage
from model_core.types import ChatMessage, ImagePart, TextPart, VideoPart, messages_from_dicts

DEFAULT_CAPTION_PROMPT = "Describe this image."
#: What somebody's own formatting of a row may stumble over.
_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_MESSAGES = 'a list of at least one message: {"role", "content"} each, or ChatMessage'


@dataclass(frozen=True, slots=True)
class Sample:
    """messages: media still lazy. trained: of each message, whether its words are labels."""

    messages: tuple[ChatMessage, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample stands, for people. row: the line of a JSON-lines file, else counted from 1."""

    file: str
    row: int


class DualVisionDataset:
    """Conversations about pictures, from JSON, JSON lines, a zip of them with images, Parquet or a datasets folder.

    Args:
        data_path: the file or folder.
        image_root: where images lie, and the only place they may lie; None is the data file's folder.
        name: for weights and reports; None is the file's stem.
        caption_prompt: what the user asks where a row has an answer alone.
    Raises:
        DataError: the file can't be read, or is of no known kind.
    """

    #: Whether a row without a picture, or without a question of its own, is refused.
    needs_image = False
    needs_question = False

    def __init__(
        self,
        data_path: str | Path,
        image_root: str | Path | None = None,
        *,
        name: str | None = None,
        caption_prompt: str = DEFAULT_CAPTION_PROMPT,
    ) -> None:
        self.data_path, self.name = Path(data_path), name or Path(data_path).stem
        self.caption_prompt = caption_prompt
        self._files = open_data(self.data_path, None if image_root is None else Path(image_root))
        if not len(self):
            raise DataError(
                "the data file holds no row", value=str(data_path), allowed="at least one conversation",
                fix="Check the path, and that the file was written whole",
            )  # fmt: skip

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self._files)

    def __getitem__(self, index: int) -> list[ChatMessage]:
        return self.conversation(index)

    def format_conversations(
        self, conversations: list[dict[str, Any]], image_path: str | bytes | list[str | bytes] | None
    ) -> Sequence[Mapping[str, Any]] | Sequence[ChatMessage]:
        """The messages of one row. Override it for a format of your own.

        Args:
            conversations: {"role": "system" | "user" | "assistant", "content": text or list of parts} each.
            image_path: the picture that no turn stands for (a list where there are several): a path, the name of a
                zip's member, a data URL or encoded bytes, to be handed on as {"type": "image", "image": image_path}.
        Returns:
            messages as `DualVisionEncoder.chat` takes them; here the pictures come before the first question.
        """
        images = image_path if isinstance(image_path, list) else [] if image_path is None else [image_path]
        turns = list(conversations)
        first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        is_answer = first < len(turns) and turns[first]["role"] == "assistant"
        if is_answer and images and not self.needs_question:
            turns.insert(first, {"role": "user", "content": self.caption_prompt})
        if images and first < len(turns):
            parts = [{"type": "image", "image": image} for image in images]
            turns[first] = turns[first] | {"content": parts + _parts(turns[first]["content"])}
        return turns

    def conversation(self, index: int) -> list[ChatMessage]:
        """The messages of one sample; its pictures are read when they are needed. Raises RecordError."""
        return list(self.sample(index).messages)

    def sample(self, index: int) -> Sample:
        """Raises RecordError: the row can't be trained on."""
        rows, store, local = self._find(index)
        turns = read_record(rows.record(local))
        shown = [store.shown(one) if _is_name(one) else one for one in turns.images]
        messages = self._formatted(turns.turns, shown, f"{rows.name} row {rows.number(local)}")
        sample = _to_sample(messages, store)
        _check(sample, needs_image=self.needs_image)
        return sample

    def _formatted(self, turns: list[dict[str, Any]], shown: list[str | bytes], where: str) -> Sequence[Any]:
        """What `format_conversations` makes of a row. Raises RecordError: it failed, or gave no messages."""
        method = f"{type(self).__name__}.format_conversations"
        try:
            found: Any = self.format_conversations(turns, shown if len(shown) > 1 else shown[0] if shown else None)
        except _FAULTS as error:  # what is said of the row on purpose, a RecordError, is none of these
            raise RecordError(
                "format_failed", f"{method} raised {type(error).__name__} for {where}", value=_raised(error),
                allowed=_MESSAGES, fix=f"Correct {method} for such a row, or leave the row out",
            ) from error  # fmt: skip
        if not isinstance(found, Sequence) or isinstance(found, str | bytes) or not found:
            raise RecordError(
                "format_failed", f"{method} returned no messages for {where}",
                value=f"{type(found).__name__} {found!r}", allowed=_MESSAGES,
                fix=f"Have {method} return the row's messages, or leave the row out",
            )  # fmt: skip
        return found

    def near_keys(self, index: int) -> list[str]:
        """Warnings about the row's keys that are not read, and near to one that is; none where it can't be read."""
        rows, _, local = self._find(index)
        try:
            return near_keys(rows.record(local))
        except RecordError:
            return []

    def place(self, index: int) -> Place:
        rows, _, local = self._find(index)
        return Place(rows.name, rows.number(local))

    def _find(self, index: int) -> tuple[Any, Store, int]:
        local = index if index >= 0 else index + len(self)
        for rows, store in self._files:
            if 0 <= local < len(rows):
                return rows, store, local
            local -= len(rows)
        raise IndexError(f"row {index} of {len(self)}")


class VQADataset(DualVisionDataset):
    """Questions about pictures: every row has a picture and a question."""

    needs_image = True
    needs_question = True


class MedicalVQADataset(VQADataset):
    """Questions about medical pictures. Deep grey is rescaled and never clipped, as everywhere here."""


class CaptioningDataset(DualVisionDataset):
    """Pictures with their descriptions; the question is `caption_prompt` where a row has none."""

    needs_image = True


def _raised(error: Exception) -> str:
    """The error with the line that raised it: reports keep no traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name} line {last.lineno})"


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _is_name(image: object) -> TypeGuard[str]:
    return isinstance(image, str) and image[:5].lower() != "data:"


def _to_sample(messages: Sequence[Any], store: Store) -> Sample:
    weights = [turn.get("weight", 1) if isinstance(turn, Mapping) else 1 for turn in messages]
    try:
        is_ready = bool(messages) and all(isinstance(one, ChatMessage) for one in messages)
        made = tuple(messages) if is_ready else messages_from_dicts(messages)
    except InputError as error:
        raise RecordError(
            "invalid_record", error.what, value=error.value, allowed=error.allowed, fix=error.fix
        ) from error
    bound = tuple(ChatMessage(one.role, tuple(_bind(part, store) for part in one.parts)) for one in made)
    trained = tuple(one.role == "assistant" and bool(weight) for one, weight in zip(bound, weights, strict=True))
    return Sample(bound, trained)


def _bind(part: Any, store: Store) -> Any:
    """A part whose names of files are looked up in the store, and nowhere else."""
    if isinstance(part, ImagePart):
        return replace(part, image=_source(part.image, store))
    if isinstance(part, VideoPart):
        return replace(part, frames=tuple(_source(frame, store) for frame in part.frames))
    return part


def _source(image: Any, store: Store) -> Any:
    if isinstance(image, LazyImage):
        return image
    return StoredImage(store, str(image)) if _is_name(image) or isinstance(image, Path) else image


def _check(sample: Sample, *, needs_image: bool) -> None:
    roles = [message.role for message in sample.messages]
    spoken = [role for role in roles if role != "system"]
    if "system" in roles[1:]:
        raise RecordError(
            "invalid_role", "a system turn stands behind the first", value=", ".join(roles),
            allowed="one, at the beginning", fix="Move it to the beginning, or leave it out",
        )  # fmt: skip
    if spoken[:1] != ["user"]:
        raise RecordError(
            "invalid_role", "the first turn is not the user's", value=", ".join(roles),
            allowed="a question first; an answer alone where the row has an image and its type is not vqa",
            fix="Put the question before the answer",
        )  # fmt: skip
    if spoken[-1] != "assistant":
        raise RecordError(
            "no_answer", "the last turn is not the assistant's", value=", ".join(roles), allowed="an answer at the end",
            fix="Add the answer, or leave the last turn out",
        )  # fmt: skip
    if not any(sample.trained):
        raise RecordError(
            "no_answer", "no turn is to be trained on", value="a weight of 0 on every answer",
            allowed="a weight of 1 on some answer", fix="Give an answer the weight 1, or leave the row out",
        )  # fmt: skip
    for number, (message, is_trained) in enumerate(zip(sample.messages, sample.trained, strict=True), 1):
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        if is_trained and not text.strip():
            raise RecordError(
                "empty_answer", f"the answer in turn {number} is empty", value=repr(text), allowed="words",
                fix="Write the answer, or leave the row out",
            )  # fmt: skip
    if needs_image and not any(isinstance(part, ImagePart) for one in sample.messages for part in one.parts):
        raise RecordError(
            "no_image", "the row has no image", value="0 images", allowed="an image in every row of this type",
            fix="Name the row's image, or leave the row out",
        )  # fmt: skip
