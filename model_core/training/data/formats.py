"""One record in any of the known formats -> turns with roles of ours, and the pictures that they speak of.

In: a parsed row: the README's, LLaVA's and ShareGPT's conversations, OpenAI's messages, a question with its answer, a
caption. Out: `Turns`. What can't be read is a RecordError with the place within the row. It opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_core.errors import RecordError
from model_core.training.data.keys import IMAGE_KEYS, near_key

#: Names of roles in the formats that are read -> ours.
ROLE_NAMES: Mapping[str, str] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
FORMATS = (
    "image_path with conversations (role, content), image with conversations (from, value), messages, "
    "question with answer, or caption"
)

_PLACEHOLDER = "<image>"
_SLOT = re.compile(r"[ \t]*\n?<image>\n?")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/|data:", re.IGNORECASE)
_NOT_TRAINED = ("tools", "functions", "tool_calls", "function_call")


@dataclass(frozen=True, slots=True)
class Turns:
    """turns: {"role", "content"} each, content a text or a list of parts {"type": "text" | "image", ...}, in the order
    of the record; a turn may have `weight` 0: not to be trained on. images: those that no part stands for."""

    turns: list[dict[str, Any]]
    images: list[str | bytes]


def read_record(record: Any) -> Turns:
    """Raises RecordError."""
    if not isinstance(record, Mapping):
        raise RecordError(
            "invalid_record", "the row is no object", value=record, allowed=FORMATS,
            fix="Write the row as an object with these names",
        )  # fmt: skip
    _refuse_tools(record)
    images = [one for key in IMAGE_KEYS for one in _images_of(record.get(key), key)]
    raw, is_llava = _raw_turns(record)
    if not raw:
        raise RecordError(
            "invalid_record", "the row has no turns", value=sorted(record), allowed=FORMATS,
            fix="Put the turns under one of these names, or leave the row out",
        )  # fmt: skip
    turns = [_turn(f"turn {i + 1}", one) for i, one in enumerate(raw)]
    return _place(turns, images, is_llava=is_llava)


def _raw_turns(record: Mapping[str, Any]) -> tuple[list[Any], bool]:
    """The turns as they stand, and whether their texts may point to images by a word."""
    for key in ("conversations", "messages"):
        found = record.get(key)
        if isinstance(found, Sequence) and not isinstance(found, str):
            return list(found), any(isinstance(one, Mapping) and "from" in one for one in found)
        if found is not None:
            raise RecordError(
                "invalid_record", f"'{key}' is no list", value=found, allowed="a list of turns",
                fix="Write the turns as a list, a single one too",
            )  # fmt: skip
    if isinstance(pairs := record.get("texts"), Sequence) and not isinstance(pairs, str):
        return [turn for pair in pairs for turn in _pair(pair, "user", "assistant")], False
    if "question" in record:
        return list(_pair(record, "question", "answer")), False
    caption = record.get("caption", record.get("text"))
    return ([{"role": "assistant", "content": caption}] if caption is not None else []), False


def _pair(pair: Any, question: str, answer: str) -> Iterator[dict[str, Any]]:
    if (
        not isinstance(pair, Mapping)
        or not isinstance(pair.get(question), str)
        or not isinstance(pair.get(answer), str)
    ):
        raise RecordError(
            "invalid_record", "a question with its answer can't be read", value=pair,
            allowed=f"texts under '{question}' and '{answer}'", fix="Give both, or leave the row out",
        )  # fmt: skip
    yield {"role": "user", "content": pair[question]}
    yield {"role": "assistant", "content": pair[answer]}


def _turn(where: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RecordError("invalid_record", f"{where} is no object", value=turn, allowed='{"role", "content"}',
                          fix='Write it as {"role": "user", "content": ...}')  # fmt: skip
    _refuse_tools(turn)
    said = turn.get("role", turn.get("from"))
    role = ROLE_NAMES.get(said) if isinstance(said, str) else None
    if role is None:
        raise RecordError("invalid_role", f"{where} has an unknown role", value=_seen(turn, "role", "from"),
                          allowed=", ".join(ROLE_NAMES),
                          fix=_meant(turn, "role", "from", otherwise="Give it one of these"))  # fmt: skip
    found: dict[str, Any] = {"role": role, "content": _content(where, turn)}
    if (weight := turn.get("weight")) is not None:
        if weight not in (0, 1) or role != "assistant":
            raise RecordError("invalid_record", f"{where} has a weight that means nothing", value=weight,
                              allowed="0 or 1, on the assistant's turns",
                              fix="Correct it, or leave it out")  # fmt: skip
        found["weight"] = int(weight)
    return found


def _content(where: str, turn: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise RecordError(
            "invalid_record", f"{where} has no content", value=_seen(turn, "content", "value"),
            allowed="a text, or a list of parts",
            fix=_meant(turn, "content", "value", otherwise="Write what is said in it, or leave the turn out"),
        )  # fmt: skip
    return [_part(f"{where}, part {i + 1}", part) for i, part in enumerate(content)]


def _seen(turn: Mapping[str, Any], *names: str) -> str:
    """What stands under the first of the names that the turn has; else the keys that stand in their place."""
    found = [turn[name] for name in names if name in turn]
    return repr(found[0]) if found else "keys " + (", ".join(map(str, turn)) or "none")


def _meant(turn: Mapping[str, Any], *names: str, otherwise: str) -> str:
    """What to do about a turn without any of these keys; `otherwise` where none is misspelt."""
    near = [] if any(name in turn for name in names) else [(key, near_key(key, names)) for key in turn]
    return next((f"Write '{known}' for {key!r}" for key, known in near if known), otherwise)


def _part(where: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        given = part.get("image_url")
        link = given.get("url") if isinstance(given, Mapping) else given
        found = _images_of(link, where)
        detail = given.get("detail") if isinstance(given, Mapping) else None
        if len(found) == 1:
            return {"type": "image", "image": found[0], **({"detail": detail} if detail else {})}
    if kind == "image":
        found = _images_of(part.get("image"), where)
        if len(found) <= 1:
            return {"type": "image", "image": found[0] if found else None}
    raise RecordError(
        "invalid_record", f"{where} can't be read", value=part,
        allowed='{"type": "text", "text"}, {"type": "image_url", "image_url": {"url"}}, {"type": "image", "image"}',
        fix="Write the part in one of these ways, with one image at most",
    )  # fmt: skip


def _images_of(value: Any, where: str) -> list[str | bytes]:
    """One image, or a flat list of them."""
    if value is None or value == "":
        return []
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_image(one, where) for one in value]
    return [_image(value, where)]


def _image(value: Any, where: str) -> str | bytes:
    if isinstance(value, Mapping):  # as the datasets library writes a picture
        value = value["bytes"] if isinstance(value.get("bytes"), bytes) else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise RecordError(
            "invalid_record", f"{where} is no image", value=value, allowed="a path, a data URL, or a list of them",
            fix="Name the picture's file, or leave it out",
        )  # fmt: skip
    if _SCHEME.match(value) and not value[:5].lower() == "data:":
        raise RecordError(
            "remote_image", f"{where} names an address", value=value,
            allowed="a path, or a data URL with the picture in it", fix="Download the pictures first",
        )  # fmt: skip
    return value


def _place(turns: list[dict[str, Any]], images: list[str | bytes], *, is_llava: bool) -> Turns:
    """Images to the places that stand for them: empty image parts, or the word <image> in a text."""
    if images or is_llava:
        turns = [turn | {"content": _split(turn["content"])} for turn in turns]
    slots = [part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]
             if part["type"] == "image" and part["image"] is None]  # fmt: skip
    if not slots:
        return Turns(turns, images)
    if len(slots) != len(images):
        raise RecordError(
            "image_count", "the row's turns and its images don't match",
            value=f"{len(slots)} places for images, {len(images)} images", allowed="a place for every image, or none",
            fix="Write <image> once for every image, or nowhere: the images then come first",
        )  # fmt: skip
    for part, image in zip(slots, images, strict=True):
        part["image"] = image
    return Turns(turns, [])


def _split(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A text with the word <image> in it as parts; the line break that LLaVA writes beside it goes with it."""
    if isinstance(content, str):
        return _split_text(content) if _PLACEHOLDER in content else content
    split = [_split_text(part["text"]) if part["type"] == "text" else [part] for part in content]
    return [part for parts in split for part in parts]


def _split_text(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(_SLOT.split(text)):
        if i:
            parts.append({"type": "image", "image": None})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": text}]


def _refuse_tools(record: Mapping[str, Any]) -> None:
    if found := [key for key in _NOT_TRAINED if record.get(key)]:
        raise RecordError(
            "tools", "calls of tools are not trained", value=", ".join(found), allowed="texts and images",
            fix="Leave the row out",
        )  # fmt: skip
