"""Image references of a request -> encoded bytes, within limits on count and size.

In: data URLs, ids of uploads, and URLs of listed hosts, which `remote.py` fetches. Out: bytes, undecoded; pixels,
formats and colours are model_core's. It refuses to open a path: `file:` and bare paths are never touched.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pybase64

from model_core.errors import EmptyImageError, ImageError, InvalidBase64Error, InvalidImageUrlError
from service.errors import ImageFileTooLargeError, InvalidBodyError, UploadNotFoundError
from service.messages import ImageReference
from service.remote import RemoteImages
from service.uploads import UploadStore

_MAX_HEADER = 256
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,15}):")


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """`max_download_bytes`: of all remote images of one request together."""

    max_images: int
    max_image_bytes: int
    max_download_bytes: int


@dataclass(frozen=True, slots=True)
class MediaSource:
    """Where a server's images come from. `owner`: whose uploads are to be seen; a route knows its caller."""

    limits: MediaLimits
    remote: RemoteImages
    uploads: UploadStore
    owner: str = ""

    def seen_by(self, owner: str) -> MediaSource:
        return replace(self, owner=owner)

    def check(self, references: Sequence[ImageReference]) -> None:
        """Everything that can be refused without a byte: the count, and where URLs point. Files are looked up."""
        if len(references) > self.limits.max_images:
            raise InvalidBodyError(
                "too many images in one request",
                value=len(references),
                allowed=f"at most {self.limits.max_images}, frames of videos included",
                fix="Send fewer",
                param="messages",
            )
        for reference in references:
            if reference.kind == "file":
                self._upload(reference)
            elif _scheme(reference.value) != "data":
                self._check_remote(reference)

    def _check_remote(self, reference: ImageReference) -> None:
        scheme = _scheme(reference.value)
        is_remote = scheme in ("http", "https")
        if not is_remote or not self.remote.is_on:
            raise InvalidImageUrlError(
                "remote images are off on this server" if is_remote else "this is not a data URL",
                value=f"{scheme}:" if scheme else "a string without a scheme",
                allowed="data:image/png;base64,... (PNG, JPEG, WEBP, GIF, BMP)",
                fix="Send the picture itself as a data URL",
                param=reference.param,
            )
        try:
            self.remote.check(reference.value)
        except ImageError as error:
            error.param = reference.param
            raise

    async def download(self, references: Sequence[ImageReference], count: Callable[[int], None]) -> dict[str, bytes]:
        """Bytes of each remote URL, all fetched at once and each once. The first failure ends the others.

        `count` is told of bytes as they come, and may raise.
        """
        first = {r.value: r for r in reversed(references) if is_remote(r)}
        total = 0

        def count_all(num_bytes: int) -> None:
            nonlocal total
            total += num_bytes
            if total > self.limits.max_download_bytes:
                raise ImageFileTooLargeError(
                    "the remote images of this request are too large together",
                    value=f"more than {self.limits.max_download_bytes} bytes",
                    allowed=f"at most {self.limits.max_download_bytes} bytes",
                    fix="Send fewer or smaller ones",
                )
            count(num_bytes)

        tasks = [asyncio.ensure_future(self._fetch(reference, count_all)) for reference in first.values()]
        try:
            return dict(zip(first, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, reference: ImageReference, count: Callable[[int], None]) -> bytes:
        try:
            return check_image_data(await self.remote.fetch(reference.value, count), self.limits, reference.param)
        except ImageError as error:
            error.param = reference.param
            raise

    def read(self, reference: ImageReference, downloads: Mapping[str, bytes]) -> bytes:
        """The bytes behind a reference that `check` has passed. May run in any thread."""
        if reference.kind == "file":
            return self._upload(reference)
        found = downloads.get(reference.value)
        return read_data_url(reference.value, self.limits, reference.param) if found is None else found

    def _upload(self, reference: ImageReference) -> bytes:
        try:
            return self.uploads.get(reference.value, self.owner)[1]
        except UploadNotFoundError as error:
            error.param = reference.param
            raise


def _scheme(url: str) -> str:
    return match.group(1).lower() if (match := _SCHEME.match(url)) else ""


def is_remote(reference: ImageReference) -> bool:
    return reference.kind == "url" and _scheme(reference.value) != "data"


def read_data_url(url: str, limits: MediaLimits, param: str) -> bytes:
    """The bytes behind a data URL. `param` names the field in errors; the URL itself is never echoed."""
    comma = url.find(",", 0, _MAX_HEADER)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise InvalidBase64Error(
            "the data URL is not base64", value=f"{len(url)} characters", allowed="data:<media type>;base64,<payload>",
            fix="Encode the file's bytes in base64, and say so before the comma", param=param,
        )  # fmt: skip
    return _decode(url, comma + 1, limits, param)


def _decode(url: str, start: int, limits: MediaLimits, param: str) -> bytes:
    # The size is known before anything is decoded: four characters hold three bytes.
    check_image_bytes((len(url) - start) * 3 // 4 - url.endswith("=") - url.endswith("=="), limits, param)
    try:
        data = pybase64.b64decode(url[start:], validate=True)
    except ValueError:  # what is no base64, and what is no ASCII
        raise InvalidBase64Error(
            "the image's base64 does not decode",
            value=f"{len(url) - start} characters",
            allowed="the standard alphabet with padding, without line breaks or percent-encoding",
            fix="Encode the file's bytes again",
            param=param,
        ) from None
    return check_image_data(data, limits, param)


def check_image_data(data: bytes, limits: MediaLimits, param: str) -> bytes:
    if not data:
        fix = "Check that the file was written and sent whole"
        raise EmptyImageError("the image is empty", value="0 bytes", allowed="an encoded image", fix=fix, param=param)
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
