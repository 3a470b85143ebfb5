"""Messages to token ids, span by span, so that nothing a user typed can become a control token.

The chat template is rendered with a private marker in the place of every text; the text between the
markers is the template's own and may hold special tokens, the texts are encoded with special tokens
split. So `<|image_pad|>` typed by a user is eleven ordinary tokens and steals no image, and the place
of every assistant answer is known exactly (for labels). Knows no image and no tensor.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from model_core.errors import ConfigError, InvalidRequestError
from model_core.types import ChatMessage, ImagePart, TextPart, VideoPart

# Private-use characters: no tokenizer's template changes them, and user text never reaches the template.
_MARK = re.compile("\ue000(\\d+)\ue001")

#: A role with the kinds of its parts: text, image, video.
_Turn = tuple[str, tuple[str, ...]]


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
            raise ConfigError(
                "the tokenizer lacks Qwen's special tokens", value=missing, allowed=", ".join(names),
                fix="Take the tokenizer's files from a Qwen2.5-VL checkpoint",
            )  # fmt: skip
        return cls(*(found[name] for name in names))


def encode_chat(tokenizer: Any, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> EncodedChat:
    """Render and encode a conversation.

    Raises:
        InvalidRequestError: no messages, a lone surrogate in a text, a template that refuses.
    """
    if not messages:
        raise InvalidRequestError(
            "there are no messages", value=[], allowed="at least one message",
            fix="Send the question as a message of the user", param="messages",
        )  # fmt: skip
    texts: list[tuple[str, int]] = []
    media: list[ImagePart | VideoPart] = []
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        kinds = []
        for part in message.parts:
            if isinstance(part, TextPart):
                kinds.append("text")
                texts.append((part.text, index))
            else:
                kinds.append("image" if isinstance(part, ImagePart) else "video")
                media.append(part)
        turns.append((message.role, tuple(kinds)))
    rendered = _render(tokenizer, tuple(turns), add_generation_prompt)
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
            "a text is not valid Unicode", value=ascii(text[error.start : error.end]), allowed="no lone surrogates",
            fix="Write both surrogates of the character, or leave it out",
        ) from error  # fmt: skip
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


def _render(tokenizer: Any, turns: tuple[_Turn, ...], add_generation_prompt: bool) -> str:
    """The template around numbered marks. It sees no text, so conversations of one form are rendered once."""
    template = tokenizer.chat_template
    if not template:
        raise ConfigError(
            "the tokenizer has no chat template", value=type(tokenizer).__name__,
            allowed="a Qwen2.5-VL tokenizer folder", fix="Take the tokenizer's files from a Qwen2.5-VL checkpoint",
        )  # fmt: skip
    # A template may ask for today's date; several by name are a dict; and long conversations are seldom alike.
    is_kept = isinstance(template, str) and "strftime" not in template and sum(1 + len(k) for _, k in turns) <= 32
    return (_rendered if is_kept else _rendered.__wrapped__)(tokenizer, template, turns, add_generation_prompt)


@functools.lru_cache(maxsize=256)
def _rendered(tokenizer: Any, _: Any, turns: tuple[_Turn, ...], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError  # noqa: PLC0415  jinja2 comes with transformers' chat templates, loaded on first use

    numbers = itertools.count()
    said = []
    for role, kinds in turns:
        content = [
            {"type": kind, "text": f"\ue000{next(numbers)}\ue001"} if kind == "text" else {"type": kind}
            for kind in kinds
        ]
        # A lone text is passed as a string, as templates that predate content parts expect.
        said.append({"role": role, "content": content[0]["text"] if kinds == ("text",) else content})
    try:
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise InvalidRequestError(
            "the chat template refuses these messages", value=str(error), allowed="what the model's own template takes",
            fix="Change the roles or the order of the messages as it says",
        ) from error  # fmt: skip


def expand_placeholders(ids: Sequence[int], counts: Sequence[int], special: SpecialIds) -> tuple[list[int], list[int]]:
    """Repeat each placeholder as often as its image has fused tokens.

    Returns:
        ids (T,), token types (T,): 0 text, 1 image, 2 video.
    """
    out: list[int] = []
    types: list[int] = []
    remaining = iter(counts)
    kinds = {special.image: 1, special.video: 2}
    begin = 0
    for place in [i for i, token in enumerate(ids) if token in kinds]:
        n = next(remaining, None)
        if n is None:
            raise InvalidRequestError(
                "there are more image placeholders than images", value=len(counts),
                allowed="one placeholder for each image or video", fix="Use Qwen2.5-VL's own chat template",
            )  # fmt: skip
        out += ids[begin:place]
        out += [ids[place]] * n
        types += [0] * (place - begin)
        types += [kinds[ids[place]]] * n
        begin = place + 1
    out += ids[begin:]
    return out, types + [0] * (len(ids) - begin)


def answer_labels(chat: EncodedChat, roles: Sequence[str], special: SpecialIds) -> list[int]:
    """Labels (T,) before expansion: the assistant's texts and the end-of-turn after each; -100 elsewhere."""
    labels = [-100] * len(chat.ids)
    for start, end, message in chat.spans:
        if roles[message] == "assistant":
            stop = end + 1 if end < len(chat.ids) and chat.ids[end] == special.end_of_turn else end
            labels[start:stop] = chat.ids[start:stop]
    return labels
