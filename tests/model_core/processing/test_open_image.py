"""open_image: what a picture may be given as, and what is never opened or fetched."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from model_core.errors import (
    EmptyImageError,
    ImageNotFoundError,
    ImageParseError,
    ImageTooLargeError,
    InvalidBase64Error,
    InvalidImageUrlError,
    UnsupportedImageError,
)
from model_core.processing.images import ImageLimits, open_image
from model_core.processing.sources import LazyImage

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8))


def encode(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[list[list[int]]]:
    return np.asarray(image).tolist()


PNG, JPEG = encode(PICTURE, "PNG"), encode(PICTURE, "JPEG")


def test_a_pil_image_is_copied() -> None:
    result = open_image(PICTURE, allow_paths=False).image
    result.putpixel((0, 0), (1, 2, 3))
    assert result is not PICTURE and PICTURE.getpixel((0, 0)) != (1, 2, 3)


def test_a_cut_pil_file_is_an_image_error() -> None:
    with pytest.raises(ImageParseError):
        open_image(Image.open(io.BytesIO(JPEG[:-400])), allow_paths=False)


def test_bytes_likes() -> None:
    for source in (PNG, bytearray(PNG), memoryview(PNG)):
        assert pixels(open_image(source, allow_paths=False).image) == pixels(PICTURE)


@pytest.mark.parametrize(
    "url",
    ["data:image/png,abc", "data:image/png;base64", "data:,", "data:", "data:image/png;base64,A", "data:x;base64,AA AA",
     "data:x;base64,AAA", "data:x;base64,_-_-", "data:x;base64,AAAA====", "data:x;base64,\u00e9\u00e9"],
)  # fmt: skip
def test_bad_data_urls(url: str) -> None:
    with pytest.raises(InvalidBase64Error):
        open_image(url, allow_paths=True)


def test_data_urls_have_the_limits_of_bytes() -> None:
    data = base64.b64encode(PNG).decode()
    assert open_image("DATA:;BASE64," + data, ImageLimits(max_bytes=len(PNG)), allow_paths=False)
    with pytest.raises(ImageTooLargeError):
        open_image("data:;base64," + data, ImageLimits(max_bytes=1000), allow_paths=False)
    with pytest.raises(EmptyImageError):
        open_image("data:;base64,", allow_paths=False)


def test_paths_only_where_they_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "a b%.png"
    file.write_bytes(PNG)
    for source in (file, str(file), file.as_uri(), file.as_uri().replace("file://", "file://localhost")):
        assert pixels(open_image(source, allow_paths=True).image) == pixels(PICTURE)
        with pytest.raises(InvalidImageUrlError, match="data URL"):
            open_image(source, allow_paths=False)


def test_missing_unreadable_and_odd_paths(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for source in (tmp_path, tmp_path / "no.png", str(tmp_path / "pipe"), "/dev/zero", "a\0b", "x" * 5000, ""):
        with pytest.raises(ImageNotFoundError):
            open_image(source, allow_paths=True)
    (tmp_path / "big").write_bytes(b"x" * 2000)
    with pytest.raises(ImageTooLargeError):
        open_image(tmp_path / "big", ImageLimits(max_bytes=1999), allow_paths=True)


@pytest.mark.parametrize(
    "url", ["http://a/b.png", "HTTPS://a", "gopher://a", "ftp://a/b", "file://host/x", "http:\\\\a"]
)
def test_urls_are_not_fetched(url: str) -> None:
    for allow_paths in (True, False):
        with pytest.raises(InvalidImageUrlError):
            open_image(url, allow_paths=allow_paths)


def test_what_is_no_source() -> None:
    for source in (None, 5, np.zeros((4, 4, 3), np.uint8), ["x"]):
        with pytest.raises(UnsupportedImageError, match="fromarray"):
            open_image(source, allow_paths=True)


def test_the_magic_decides_not_the_declared_type() -> None:
    url = "data:image/jpeg;base64," + base64.b64encode(PNG).decode()
    assert pixels(open_image(url, allow_paths=False).image) == pixels(PICTURE)


def test_a_lazy_image_is_read_when_it_is_opened_and_within_the_limit() -> None:
    """What names a place of its own making needs no permission to open paths."""

    class Kept(LazyImage):
        limits: ClassVar[list[int]] = []

        def read(self, max_bytes: int) -> bytes:
            self.limits.append(max_bytes)
            return PNG

    kept = Kept()
    assert kept.limits == []
    assert pixels(open_image(kept, ImageLimits(max_bytes=len(PNG)), allow_paths=False).image) == pixels(PICTURE)
    assert kept.limits == [len(PNG)]
    with pytest.raises(ImageTooLargeError):
        open_image(kept, ImageLimits(max_bytes=10), allow_paths=False)
