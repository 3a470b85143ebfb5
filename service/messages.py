"""Messages of a body -> ChatMessages of `model_core.types`, and what images they refer to.

In: validated messages, and something that turns a reference into bytes. Out: ChatMessages, part for part in the same
places, so that an error can name where its picture stood. It refuses to know where images come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from model_core.errors import ContextLengthError, InvalidRequestError
from model_core.types import ChatMessage, ImagePart, ModelInfo, Part, TextPart, VideoPart
from service.protocol.content import (
    Frame,
    ImageContent,
    ImageFileContent,
    ImageUrlContent,
    InputImageContent,
    Message,
    TextContent,
    VideoContent,
    detail_of,
)

#: No vocabulary packs more characters into a token; text beyond is refused before it is tokenised.
_MAX_CHARACTERS_PER_TOKEN = 256
_IMAGES = (ImageUrlContent, InputImageContent, ImageFileContent)
_DEFAULT_FPS = 2.0


@dataclass(frozen=True, slots=True)
class ImageReference:
    """What one picture or frame refers to. `param` names the field in errors."""

    kind: Literal["url", "file"]
    value: str
    param: str


#: What turns a reference into bytes; media.py has the real one.
ReadImage = Callable[[ImageReference], bytes]


def image_references(messages: Sequence[Message]) -> list[ImageReference]:
    """Of every picture and frame, in order. Raises InvalidRequestError where one refers to none, or to two."""
    return [
        reference
        for m, message in enumerate(messages)
        if not isinstance(message.content, str)
        for i, part in enumerate(message.content)
        for reference in _references(f"messages[{m}].content[{i}]", part)
    ]


def _references(where: str, part: object) -> Iterator[ImageReference]:
    if isinstance(part, _IMAGES):
        yield _reference(where, part)
    elif isinstance(part, VideoContent):
        for index, frame in enumerate(part.video):
            yield _reference(f"{where}.video[{index}]", frame)


def _reference(where: str, part: Frame) -> ImageReference:
    if isinstance(part, str):
        return ImageReference("url", part, where)
    if isinstance(part, ImageUrlContent):
        return ImageReference("url", part.image_url.url, f"{where}.image_url.url")
    if isinstance(part, ImageFileContent):
        return ImageReference("file", part.image_file.file_id, f"{where}.image_file.file_id")
    if isinstance(part, InputImageContent):
        if part.image_url is not None and part.file_id is None:
            return ImageReference("url", part.image_url, f"{where}.image_url")
        if part.file_id is not None and part.image_url is None:
            return ImageReference("file", part.file_id, f"{where}.file_id")
    raise InvalidRequestError(
        "an image part refers to one picture",
        value="none, or two",
        allowed="'image_url' or 'file_id'",
        fix="Give one of the two",
        param=f"{where}.image_url",
    )


def require_images(messages: Sequence[Message]) -> None:
    """Raises InvalidRequestError if there is nothing to analyze."""
    if not image_references(messages):
        raise InvalidRequestError(
            "there is nothing to analyze: the messages hold no image",
            value=f"{len(messages)} message(s), 0 images",
            allowed="messages with at least one image",
            fix="Add a picture as an image_url part with a data URL",
            param="messages",
        )


def transcript(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Roles and texts, for a log whose owner asks for content; a picture is `<image_url>`."""
    return [{"role": message.role, "text": _spoken(message.content)} for message in messages]


def _spoken(content: str | Sequence[object]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextContent) else f"<{getattr(part, 'type', '')}>" for part in content)


def to_messages(messages: Sequence[Message], read_image: ReadImage, info: ModelInfo) -> tuple[ChatMessage, ...]:
    """Decodes base64, so it belongs in the preprocess pool. Raises ImageError, ContextLengthError."""
    _check_text_length(messages, info)
    return tuple(_to_message(f"messages[{index}]", message, read_image) for index, message in enumerate(messages))


def _check_text_length(messages: Sequence[Message], info: ModelInfo) -> None:
    count = 0
    for message in messages:
        parts = (message.content,) if isinstance(message.content, str) else message.content
        count += sum(len(p) if isinstance(p, str) else len(p.text) for p in parts if isinstance(p, (str, TextContent)))
    if count > info.max_context_tokens * _MAX_CHARACTERS_PER_TOKEN:
        raise ContextLengthError(
            "the prompt does not fit the context",
            value=f"{count} characters",
            allowed=f"{info.max_context_tokens} tokens",
            fix="Shorten the conversation",
            param="messages",
        )


def _to_message(where: str, message: Message, read_image: ReadImage) -> ChatMessage:
    role: Literal["system", "user", "assistant"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return ChatMessage(role, (TextPart(message.content),))
    return ChatMessage(
        role, tuple(_to_part(f"{where}.content[{i}]", part, read_image) for i, part in enumerate(message.content))
    )


def _to_part(where: str, part: object, read_image: ReadImage) -> Part:
    if isinstance(part, TextContent):
        return TextPart(part.text)
    if isinstance(part, _IMAGES):
        return ImagePart(read_image(_reference(where, part)), detail=detail_of(part) or "auto")
    if isinstance(part, VideoContent):
        return _to_video(where, part, read_image)
    raise InvalidRequestError(
        "unknown content part", value=type(part).__name__, allowed="text, image_url, input_image, image_file, video",
        fix="Name its type, and give what that type holds", param=where,
    )  # fmt: skip


def _to_video(where: str, part: VideoContent, read_image: ReadImage) -> VideoPart:
    for index, frame in enumerate(part.video):
        _check_frame_detail(f"{where}.video[{index}]", frame)
    frames = tuple(read_image(reference) for reference in _references(where, part))
    return VideoPart(frames, _DEFAULT_FPS if part.fps is None else part.fps, part.detail or "auto")


def _check_frame_detail(where: str, frame: Frame) -> None:
    # Frames share one grid, so a detail of their own could only be ignored.
    detail = detail_of(frame) if isinstance(frame, ImageContent) else None
    if detail is not None:
        raise InvalidRequestError(
            "a video's frames have one detail between them",
            value=detail,
            allowed="'detail' of the video part",
            fix="Move it from the frame to the video part",
            param=f"{where}.detail",
        )


def upload_messages(data: bytes, question: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage("user", (ImagePart(data), TextPart(question))),)
