"""Messages to token ids, span by span, so that nothing a user typed can become a control token.

The chat template is rendered with a private marker in the place of every text; the text between the
markers is the template's own and may hold special tokens, the texts are encoded with special tokens
split. So `<|image_pad|>` typed by a user is eleven ordinary tokens and steals no image, and the place
of every assistant answer is known exactly (for labels). Knows no image and no tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from model_core.errors import ConfigError, InvalidRequestError
from model_core.types import ChatMessage, ImagePart, TextPart, VideoPart

# Private-use characters: no tokenizer's template changes them, and user text never reaches the template.
_MARK = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """ids: with ONE placeholder id for each image or video; spans: (start, end, message index) of each
    text, in ids; media: the image and video parts in the order of their placeholders."""

    ids: list[int]
    spans: list[tuple[int, int, int]]
    media: list[ImagePart | VideoPart]


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids that Qwen2.5-VL's format turns on."""

    image: int
    video: int
    end_of_turn: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> SpecialIds:
        found = tokenizer.get_added_vocab()
        names = ("<|image_pad|>", "<|video_pad|>", "<|im_end|>")
        missing = [name for name in names if name not in found]
        if missing:
            raise ConfigError("the tokenizer lacks Qwen's special tokens", value=missing, allowed=", ".join(names))
        return cls(*(found[name] for name in names))


def encode_chat(tokenizer: Any, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> EncodedChat:
    """Render and encode a conversation.

    Raises:
        InvalidRequestError: no messages, a lone surrogate in a text, a template that refuses.
    """
    if not messages:
        raise InvalidRequestError("there are no messages", value=[], allowed="at least one message", param="messages")
    texts: list[tuple[str, int]] = []
    media: list[ImagePart | VideoPart] = []
    turns = []
    for index, message in enumerate(messages):
        content = []
        for part in message.parts:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": f"\ue000{len(texts)}\ue001"})
                texts.append((part.text, index))
            else:
                content.append({"type": "image" if isinstance(part, ImagePart) else "video"})
                media.append(part)
        # A lone text is passed as a string, as templates that predate content parts expect.
        plain = len(content) == 1 and content[0]["type"] == "text"
        turns.append({"role": message.role, "content": content[0]["text"] if plain else content})
    rendered = _render(tokenizer, turns, add_generation_prompt)
    ids: list[int] = []
    spans: list[tuple[int, int, int]] = []
    for i, piece in enumerate(_MARK.split(rendered)):
        if i % 2 == 0:
            ids += _template_ids(tokenizer, len(tokenizer), piece) if piece else ()
        else:
            text, index = texts[int(piece)]
            start = len(ids)
            ids += encode_text(tokenizer, text)
            spans.append((start, len(ids), index))
    return EncodedChat(ids, spans, media)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """A user's text as ids, none of them special."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            "a text is not valid Unicode", value=ascii(text[error.start : error.end]), allowed="no lone surrogates"
        ) from error
    return _backends(tokenizer, len(tokenizer))[1].encode(text, add_special_tokens=False).ids if text else []


@functools.lru_cache(maxsize=1024)
def _template_ids(tokenizer: Any, size: int, piece: str) -> tuple[int, ...]:
    """The template's own text, which is the same few pieces in every conversation."""
    return tuple(_backends(tokenizer, size)[0].encode(piece, add_special_tokens=False).ids)


@functools.lru_cache(maxsize=8)
def _backends(tokenizer: Any, _: int) -> tuple[Tokenizer, Tokenizer]:
    """Two copies of the tokenizer: one that knows special tokens, one that splits them.

    transformers keeps "split special tokens" as state of the one tokenizer and sets it before each
    encode, so two threads would encode with each other's setting. These never change.
    """
    serialised = tokenizer.backend_tokenizer.to_str()
    special, plain = Tokenizer.from_str(serialised), Tokenizer.from_str(serialised)
    for copy in (special, plain):
        copy.no_padding()
        copy.no_truncation()
    special.encode_special_tokens, plain.encode_special_tokens = False, True
    return special, plain


def _render(tokenizer: Any, turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template", allowed="a Qwen2.5-VL tokenizer folder")
    from jinja2 import TemplateError  # noqa: PLC0415  jinja2 comes with transformers' chat templates, loaded on first use

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise InvalidRequestError("the chat template refuses these messages", value=str(error)) from error


def expand_placeholders(ids: Sequence[int], counts: Sequence[int], special: SpecialIds) -> tuple[list[int], list[int]]:
    """Repeat each placeholder as often as its image has fused tokens.

    Returns:
        ids (T,), token types (T,): 0 text, 1 image, 2 video.
    """
    out: list[int] = []
    types: list[int] = []
    remaining = iter(counts)
    for token in ids:
        kind = 1 if token == special.image else 2 if token == special.video else 0
        n = next(remaining, None) if kind else 1
        if n is None:
            raise InvalidRequestError("there are more image placeholders than images", value=len(counts))
        out += [token] * n
        types += [kind] * n
    return out, types


def answer_labels(chat: EncodedChat, roles: Sequence[str], special: SpecialIds) -> list[int]:
    """Labels (T,) before expansion: the assistant's texts and the end-of-turn after each; -100 elsewhere."""
    labels = [-100] * len(chat.ids)
    for start, end, message in chat.spans:
        if roles[message] == "assistant":
            stop = end + 1 if end < len(chat.ids) and chat.ids[end] == special.end_of_turn else end
            labels[start:stop] = chat.ids[start:stop]
    return labels
