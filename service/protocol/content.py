"""What a message holds: text, pictures under each of OpenAI's spellings, and videos as lists of frames.

In: JSON. Out: validated parts, and the names of fields in them that nothing reads. It refuses to resolve a URL or a
file id.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag

from model_core.types import MAX_FPS, MIN_FPS
from service.protocol.body import TOLERANT

MAX_PARTS = 1024

Detail = Literal["low", "high", "auto"]
FileId = Annotated[str, StringConstraints(min_length=1, max_length=200)]

_IMAGE_TYPES = ("image_url", "input_image", "image_file")


class TextContent(BaseModel):
    model_config = TOLERANT
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = TOLERANT
    url: str
    detail: Detail | None = None


class ImageUrlContent(BaseModel):
    model_config = TOLERANT
    type: Literal["image_url"]
    image_url: ImageUrl


class InputImageContent(BaseModel):
    """The Responses API's spelling of the same part: a URL, or an uploaded file."""

    model_config = TOLERANT
    type: Literal["input_image"]
    image_url: str | None = None
    file_id: FileId | None = None
    detail: Detail | None = None


class ImageFile(BaseModel):
    model_config = TOLERANT
    file_id: FileId
    detail: Detail | None = None


class ImageFileContent(BaseModel):
    """The Assistants API's spelling of an uploaded picture."""

    model_config = TOLERANT
    type: Literal["image_file"]
    image_file: ImageFile


class OtherFrame(BaseModel):
    """Anything else in a video's list: its type alone is read, to be refused by name."""

    model_config = TOLERANT
    type: Literal["image_url", "input_image", "image_file"]


def _tag(value: object, known: tuple[str, ...]) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in known else "<other>"


ImageContent = ImageUrlContent | InputImageContent | ImageFileContent

#: One frame of a video: a URL, or any image part.
Frame = Annotated[
    Annotated[str, Tag("<url>")]
    | Annotated[ImageUrlContent, Tag("<image_url>")]
    | Annotated[InputImageContent, Tag("<input_image>")]
    | Annotated[ImageFileContent, Tag("<image_file>")]
    | Annotated[OtherFrame, Tag("<other>")],
    Discriminator(lambda value: "<url>" if isinstance(value, str) else _tag(value, _IMAGE_TYPES)),
]


class VideoContent(BaseModel):
    """Qwen's part: the frames in their order, and how many of them make a second."""

    model_config = TOLERANT
    type: Literal["video"]
    video: Annotated[tuple[Frame, ...], Field(min_length=1, max_length=MAX_PARTS)]
    fps: Annotated[float, Field(ge=MIN_FPS, le=MAX_FPS)] | None = None
    detail: Detail | None = None


class OtherContent(BaseModel):
    """Any other part: its type alone is read, to be refused by name."""

    model_config = TOLERANT
    type: Literal["text", "image_url", "input_image", "image_file", "video"]


ContentPart = Annotated[
    Annotated[TextContent, Tag("<text>")]
    | Annotated[ImageUrlContent, Tag("<image_url>")]
    | Annotated[InputImageContent, Tag("<input_image>")]
    | Annotated[ImageFileContent, Tag("<image_file>")]
    | Annotated[VideoContent, Tag("<video>")]
    | Annotated[OtherContent, Tag("<other>")],
    Discriminator(lambda value: _tag(value, (*_IMAGE_TYPES, "text", "video"))),
]
Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[tuple[ContentPart, ...], Field(min_length=1, max_length=MAX_PARTS), Tag("<parts>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<parts>"),
]


class Message(BaseModel):
    model_config = TOLERANT
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


def extra_names(where: str, model: BaseModel | None) -> list[str]:
    """Fields that nothing reads, by their paths. A null asks for nothing."""
    extra = (model.model_extra or {}) if model is not None else {}
    return [f"{where}.{name}" for name, value in extra.items() if value is not None]


def content_extras(where: str, content: str | tuple[object, ...]) -> list[str]:
    """Names of the fields of a message's parts that nothing reads."""
    ignored = []
    for index, part in enumerate(() if isinstance(content, str) else content):
        ignored.extend(_part_extras(f"{where}.content[{index}]", part))
    return ignored


def _part_extras(where: str, part: object) -> list[str]:
    ignored = extra_names(where, part) if isinstance(part, BaseModel) else []
    if isinstance(part, ImageUrlContent):
        ignored.extend(extra_names(f"{where}.image_url", part.image_url))
    elif isinstance(part, ImageFileContent):
        ignored.extend(extra_names(f"{where}.image_file", part.image_file))
    elif isinstance(part, VideoContent):
        for index, frame in enumerate(part.video):
            ignored.extend(_part_extras(f"{where}.video[{index}]", frame))
    return ignored


def detail_of(part: ImageContent) -> Detail | None:
    if isinstance(part, ImageUrlContent):
        return part.image_url.detail
    return part.image_file.detail if isinstance(part, ImageFileContent) else part.detail
