"""Keys of a row that are not read, and look like one that is: most often a misspelt `image_path`.

In: a parsed row; out: warnings in words. Rows may hold anything else beside, so a key is told only where the row lacks
the one that it is near to, and where its value could be that one's. It refuses nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

IMAGE_KEYS = ("image_path", "image_paths", "image", "images")
_LISTS = ("conversations", "messages", "texts")
_PAIR = ("question", "answer")
_CAPTIONS = ("caption", "text")
_KNOWN = frozenset([*IMAGE_KEYS, *_LISTS, *_PAIR, *_CAPTIONS])
#: Below it stand words of their own: 'age' and 'page' beside 'image', 'context' beside 'text'.
_CUTOFF = 0.8
_LONGEST = 64


def near_keys(record: Any) -> list[str]:
    """A warning for each key that is not read, and near to one that the row lacks."""
    lacks = _lacks(record) if isinstance(record, Mapping) else ()
    found = [(key, near_key(key, _fitting(lacks, value))) for key, value in record.items()] if lacks else []
    return [
        f"the row has a key {key!r}, which is not read, and no '{known}', which is. Write '{known}' if that is meant"
        for key, known in found
        if known
    ]


@lru_cache(maxsize=1024)  # the same few keys in every row
def near_key(key: object, known: tuple[str, ...]) -> str:
    """The known key that this one may be meant for; empty where it is known itself, or near to none."""
    if not isinstance(key, str) or key in _KNOWN or key in known or len(key) > _LONGEST:
        return ""
    plain = key.lower().replace("-", "_").replace("img", "image")
    return next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=_CUTOFF)), "")


def _lacks(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys that the row's format would read, and that say nothing in it."""
    has = {key for key in _KNOWN if record.get(key) not in (None, "", [])}
    images = () if has.intersection(IMAGE_KEYS) or _shows_images(record) else IMAGE_KEYS
    if has.intersection(_LISTS):
        turns: tuple[str, ...] = ()
    elif has.intersection(_PAIR):
        turns = (*_LISTS, *_PAIR)
    else:
        turns = _LISTS if has.intersection(_CAPTIONS) else (*_LISTS, *_PAIR, *_CAPTIONS)
    return tuple(key for key in (*images, *turns) if key not in has)


def _shows_images(record: Mapping[str, Any]) -> bool:
    """Whether some turn has its picture in itself, as OpenAI's have."""
    turns = [turn for key in ("conversations", "messages") for turn in _list(record.get(key))]
    contents = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
    parts = [part for content in contents for part in _list(content) if isinstance(part, Mapping)]
    return any(part.get("image") or part.get("image_url") for part in parts)


def _fitting(known: Sequence[str], value: Any) -> tuple[str, ...]:
    """Those of the keys that such a value could belong to: a conversation_id, a text, is no 'conversations'."""
    if isinstance(value, str) and value:
        return tuple(key for key in known if key not in _LISTS)
    if _list(value):
        return tuple(key for key in known if key in (*IMAGE_KEYS, *_LISTS))
    return tuple(key for key in known if key in IMAGE_KEYS) if value and isinstance(value, bytes | Mapping) else ()


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
