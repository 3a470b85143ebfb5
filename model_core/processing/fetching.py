"""Pictures that messages name by an http or https URL, brought by a function of the caller's.

In: messages and that function; out: the same messages, each such address a picture that is fetched when its bytes are
needed, once, however many requests share the messages. It downloads nothing itself and judges no address.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from model_core.errors import ConfigError, ImageTooLargeError, UnsupportedImageError
from model_core.processing.sources import SHRINK, LazyImage, is_remote
from model_core.types import ChatMessage, ImagePart, Part, VideoPart

#: A URL to the encoded bytes of the picture there. What it raises comes through as it is.
FetchImage = Callable[[str], bytes]


class FetchedImage(LazyImage):
    """One address; its bytes are kept once they were fetched."""

    def __init__(self, url: str, fetch: FetchImage) -> None:
        self._url, self._fetch = url, fetch
        self._data: bytes | None = None

    def read(self, max_bytes: int) -> bytes:
        if self._data is None:
            found: object = self._fetch(self._url)
            if not isinstance(found, (bytes, bytearray, memoryview)):
                raise UnsupportedImageError(
                    "fetch_image gave no bytes", value=type(found).__name__, allowed="the bytes of a picture file",
                    fix="Return the body of the response",
                )  # fmt: skip
            self._data = bytes(found)
        if len(self._data) > max_bytes:
            raise ImageTooLargeError(
                "the fetched image has too many bytes", value=len(self._data), allowed=f"{max_bytes} bytes", fix=SHRINK
            )
        return self._data


def check_fetch(fetch: Any) -> FetchImage | None:
    """What was given as `fetch_image`. Raises ConfigError: it can't be called."""
    if fetch is not None and not callable(fetch):
        raise ConfigError(
            "fetch_image can't be called", value=fetch, allowed="a function from a URL to bytes, or None",
            fix="Pass the function itself", param="fetch_image",
        )  # fmt: skip
    return fetch


def with_fetched(messages: Sequence[ChatMessage], fetch: FetchImage | None) -> tuple[ChatMessage, ...]:
    """The messages with every http(s) address as a `FetchedImage`, one for each; without `fetch` as they are."""
    if fetch is None:
        return tuple(messages)
    made: dict[str, FetchedImage] = {}

    def picture(source: Any) -> Any:
        return made.setdefault(source, FetchedImage(source, fetch)) if is_remote(source) else source

    def fetched(part: Part) -> Part:
        if isinstance(part, ImagePart):
            return replace(part, image=picture(part.image))
        if isinstance(part, VideoPart):
            return replace(part, frames=tuple(picture(frame) for frame in part.frames))
        return part

    return tuple(replace(m, parts=tuple(fetched(part) for part in m.parts)) for m in messages)
