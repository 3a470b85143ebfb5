"""Where a picture is kept -> its encoded bytes.

In: bytes, a PIL image, a LazyImage, a data URL, or a path where paths are allowed. Out: bytes, undecoded, within a
limit; a PIL image as it is. It refuses to download, and to open a path or a file URL unless it is told that it may.
"""

from __future__ import annotations

import binascii
import os
import re
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from model_core.errors import (
    ImageNotFoundError,
    ImageTooLargeError,
    InvalidBase64Error,
    InvalidImageUrlError,
    UnsupportedImageError,
)

_DATA_URL = "data:image/png;base64,<base64 of the file>"
_FILE = "the path of a picture file that this program may read"
#: What to do about a file of too many bytes.
SHRINK = "Scale it down or compress it more"


class LazyImage(ABC):
    """A picture that is read when it is needed. Whoever made it answers for where it looks, so no path rule applies."""

    @abstractmethod
    def read(self, max_bytes: int) -> bytes:
        """The encoded bytes. Raises ImageError, also where there are more than `max_bytes`."""


def load_source(source: object, max_bytes: int, *, allow_paths: bool) -> bytes | Image.Image:
    """The encoded bytes of a picture, or the PIL image itself. Raises ImageError."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, LazyImage):
        return source.read(max_bytes)
    if isinstance(source, os.PathLike):
        return _read_path(os.fspath(source), max_bytes, allow_paths=allow_paths)
    if not isinstance(source, str):
        allowed = "bytes, a PIL image, a data URL" + (" or a path" if allow_paths else "")
        fix = "Wrap an array with PIL.Image.fromarray"
        raise UnsupportedImageError("this is no image source", value=type(source).__name__, allowed=allowed, fix=fix)
    return _read_address(source, max_bytes, allow_paths=allow_paths)


def is_remote(source: object) -> bool:
    """Is it an http or https URL?"""
    return isinstance(source, str) and re.match(r"https?:", source, re.IGNORECASE) is not None


def _read_address(address: str, max_bytes: int, *, allow_paths: bool) -> bytes:
    if address[:5].lower() == "data:":
        return _read_data_url(address, max_bytes)
    if is_remote(address):
        fix = (
            'Download it first ("curl -o picture.jpg URL") and pass its bytes or a data URL; or give DualVisionEncoder '
            "a fetch_image=, your function that takes the URL and returns the bytes"
        )
        raise InvalidImageUrlError("remote images are turned off", value=address, allowed=_DATA_URL, fix=fix)
    if address[:5].lower() == "file:":
        host, _, path = address[5:].removeprefix("//").partition("/")
        if host.lower() not in ("", "localhost"):
            fix = "Copy the file to this machine and leave the host out"
            raise InvalidImageUrlError("this file URL is not local", value=address, allowed="file:///path", fix=fix)
        return _read_path("/" + unquote(path), max_bytes, allow_paths=allow_paths)
    if re.match(r"[a-z][a-z0-9+.-]*://", address, re.IGNORECASE):
        fix = "Fetch it yourself and pass its bytes or a data URL"
        raise InvalidImageUrlError("this URL scheme is not fetched", value=address, allowed=_DATA_URL, fix=fix)
    return _read_path(address, max_bytes, allow_paths=allow_paths)


def _read_data_url(url: str, max_bytes: int) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        fix = "Encode the file's bytes in base64, and say so before the comma"
        raise InvalidBase64Error("the data URL is not base64", value=header[:80], allowed=_DATA_URL, fix=fix)
    if len(payload) > (max_bytes + 2) // 3 * 4:  # before anything of that size is decoded
        raise ImageTooLargeError("the image has too many bytes", value=f"{len(payload)} characters of base64",
                                 allowed=f"{max_bytes} bytes", fix=SHRINK)  # fmt: skip
    try:
        if payload.endswith("==="):  # more padding than base64 has, which even strict mode takes
            raise ValueError("padding")
        return binascii.a2b_base64(payload, strict_mode=True)
    except ValueError as error:  # binascii.Error, and characters outside ASCII
        fix = "Use the standard alphabet (+ and /) with = padding and without spaces or line breaks"
        raise InvalidBase64Error("the data URL's base64 does not decode", value=payload[:40], allowed=_DATA_URL,
                                 fix=fix) from error  # fmt: skip


def _read_path(path: str | bytes, max_bytes: int, *, allow_paths: bool) -> bytes:
    if not allow_paths:
        fix = "Send the bytes as a data URL: data:image/png;base64,..."
        raise InvalidImageUrlError("paths and file URLs are not opened here", value=path, allowed=_DATA_URL, fix=fix)
    try:
        found = Path(os.fsdecode(path)).stat()
        if not stat.S_ISREG(found.st_mode):  # a directory; or a pipe or device, which may never end
            fix = "Name one picture; for several send a part for each"
            raise ImageNotFoundError("this path is not a file", value=path, allowed=_FILE, fix=fix)
        if found.st_size > max_bytes:
            allowed = f"{max_bytes} bytes"
            raise ImageTooLargeError("the file is too large", value=found.st_size, allowed=allowed, fix=SHRINK)
        return Path(os.fsdecode(path)).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        fix = "Check the path, and from which folder it counts"
        raise ImageNotFoundError("the image file can't be read", value=path, allowed=_FILE, fix=fix) from error
