"""Image references of a request -> encoded bytes, within limits on count and size.

In: data URLs. Out: bytes, undecoded; pixels, formats and colours are model_core's. It refuses to open a
path or a connection: `file:` and bare paths are never touched, and remote images are off.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass

from model_core.errors import EmptyImageError, InvalidBase64Error, InvalidImageUrlError
from service.errors import ImageFileTooLargeError, InvalidBodyError

_MAX_HEADER = 256
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,15}):")


@dataclass(frozen=True, slots=True)
class MediaLimits:
    max_images: int
    max_image_bytes: int


def check_image_count(count: int, limits: MediaLimits) -> None:
    if count > limits.max_images:
        raise InvalidBodyError(
            "too many images in one request", value=count, allowed=f"at most {limits.max_images}", param="messages"
        )


def read_image_url(url: str, limits: MediaLimits, param: str) -> bytes:
    """The bytes behind a data URL. `param` names the field in errors; the URL itself is never echoed."""
    scheme = match.group(1).lower() if (match := _SCHEME.match(url)) else ""
    if scheme != "data":
        is_remote = scheme in ("http", "https")
        raise InvalidImageUrlError(
            "remote images are off on this server" if is_remote else "this is not a data URL",
            value=f"{scheme}:" if scheme else "a string without a scheme",
            allowed="data:image/png;base64,... (PNG, JPEG, WEBP, GIF, BMP)",
            fix="Send the picture itself as a data URL",
            param=param,
        )
    comma = url.find(",", 0, _MAX_HEADER)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise InvalidBase64Error(
            "the data URL is not base64", allowed="data:<media type>;base64,<payload>", param=param
        )
    return _decode(url, comma + 1, limits, param)


def _decode(url: str, start: int, limits: MediaLimits, param: str) -> bytes:
    # The size is known before anything is decoded: four characters hold three bytes.
    check_image_bytes((len(url) - start) * 3 // 4 - url.endswith("=") - url.endswith("=="), limits, param)
    try:
        data = binascii.a2b_base64(url[start:].encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise InvalidBase64Error(
            "the image's base64 does not decode",
            allowed="the standard alphabet with padding, without line breaks or percent-encoding",
            param=param,
        ) from None
    return check_image_data(data, limits, param)


def check_image_data(data: bytes, limits: MediaLimits, param: str) -> bytes:
    if not data:
        raise EmptyImageError("the image is empty", value="0 bytes", allowed="an encoded image", param=param)
    check_image_bytes(len(data), limits, param)
    return data


def check_image_bytes(num_bytes: int, limits: MediaLimits, param: str) -> None:
    if num_bytes > limits.max_image_bytes:
        raise ImageFileTooLargeError(
            "the image file is too large",
            value=f"{num_bytes} bytes",
            allowed=f"at most {limits.max_image_bytes} bytes",
            fix="Scale it down or compress it",
            param=param,
        )
