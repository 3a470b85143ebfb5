"""Images: no bytes may raise anything but ImageError, colours are exact, patches equal transformers' to the bit."""

from __future__ import annotations

import io
import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from model_core.errors import (
    ConfigError,
    EmptyImageError,
    ImageError,
    ImageParseError,
    ImageTooLargeError,
    ImageTooSmallError,
    UnsupportedImageError,
)
from model_core.processing.images import ImageLimits, decode_image, open_image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes = b"", *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: Pillow can't write 16-bit colour, 2-bit grey, or a size that isn't true."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(int(v) for v in pixel) for pixel in np.asarray(image).reshape(-1, 3)]


def decoded(data: bytes) -> list[tuple[int, ...]]:
    result = decode_image(data)
    assert result.image.mode == "RGB" and type(result.image) is Image.Image
    return pixels(result.image)


def opened(image: Image.Image) -> list[tuple[int, ...]]:
    return pixels(open_image(image, allow_paths=False).image)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


PICTURE = noise(31, 24)
TURNED = PICTURE.rotate(180)
SAMPLES = {
    "png": encode(PICTURE, "PNG"),
    "png-palette": encode(PICTURE.quantize(7), "PNG"),
    "apng": encode(PICTURE, "PNG", save_all=True, append_images=[TURNED]),
    "jpeg": encode(PICTURE, "JPEG"),
    "jpeg-progressive-exif": encode(PICTURE, "JPEG", progressive=True, exif=exif(6)),
    "gif": encode(PICTURE.quantize(16), "GIF"),
    "gif-animated": encode(PICTURE.quantize(16), "GIF", save_all=True, append_images=[TURNED.quantize(16)]),
    "webp": encode(PICTURE, "WEBP"),
    "webp-lossless": encode(PICTURE, "WEBP", lossless=True),
    "webp-animated": encode(PICTURE, "WEBP", save_all=True, append_images=[TURNED], lossless=True),
    "bmp": encode(PICTURE, "BMP"),
    "bmp-palette": encode(PICTURE.quantize(16), "BMP"),
}


class TestLimits:
    def test_zero_bytes(self) -> None:
        with pytest.raises(EmptyImageError):
            decode_image(b"")

    def test_a_69_byte_bomb_is_refused_from_its_header(self) -> None:
        bomb = png(50_000, 50_000, 8, 2, b"\0")
        assert len(bomb) < 80
        with pytest.raises(ImageTooLargeError, match="50000 x 50000"):
            decode_image(bomb)
        with pytest.raises(ImageTooLargeError):  # even where nothing but the header is there
            decode_image(bomb[:33])

    @pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
    def test_every_format_is_measured_before_pillow_sees_it(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pillow's WebP plugin allocates the canvas in open(), so Image.open must not have been called."""
        data = encode(PICTURE, name)
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
        with pytest.raises(ImageTooLargeError, match="31 x 24"):
            decode_image(data, ImageLimits(max_pixels=700))

    def test_a_gif_whose_first_frame_outgrows_its_screen(self) -> None:
        data = bytearray(encode(PICTURE.quantize(4), "GIF"))
        at = data.index(b"\x2c\0\0\0\0")
        data[at + 1 : at + 5] = b"\xff\xff\xff\xff"
        with pytest.raises(ImageTooLargeError):
            decode_image(bytes(data))

    def test_a_second_png_header_can_not_change_the_size(self) -> None:
        second = (b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))
        with pytest.raises(ImageParseError):
            decode_image(png(2, 2, 8, 0, b"\0\0\0" * 2, second))

    @pytest.mark.parametrize(
        ("size", "error"),
        [((1, 1), ImageTooSmallError), ((1, 60_000), ImageTooLargeError), ((60_000, 1), ImageTooLargeError),
         ((1, 100), ImageTooSmallError), ((2, 401), ImageTooLargeError), ((0, 5), ImageParseError)],
    )  # fmt: skip
    def test_shapes(self, size: tuple[int, int], error: type[ImageError]) -> None:
        with pytest.raises(error):
            decode_image(png(*size, 8, 0, b"\0" * 60_000))
        if min(size):
            with pytest.raises(error):
                open_image(Image.new("L", size), allow_paths=False)

    def test_the_limits_themselves_are_allowed(self) -> None:
        assert decode_image(encode(Image.new("RGB", (2, 400)), "PNG")).image.size == (2, 400)
        data = SAMPLES["png"]
        assert decode_image(data, ImageLimits(max_bytes=len(data), max_pixels=31 * 24)).image.size == (31, 24)
        with pytest.raises(ImageTooLargeError, match="bytes"):
            decode_image(data, ImageLimits(max_bytes=len(data) - 1))

    def test_settings_are_checked(self) -> None:
        with pytest.raises(ConfigError, match="89478485"):
            ImageLimits(max_pixels=10**9)
        with pytest.raises(ConfigError, match="EPS"):
            ImageLimits(formats=("PNG", "EPS"))

    def test_pillow_globals_and_warnings_stay_as_they_are(self) -> None:
        """MAX_IMAGE_PIXELS and the warning filters are seen by every thread."""
        before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with pytest.raises(ImageTooLargeError):
                decode_image(png(10_000, 10_000, 8, 2))  # Pillow would warn here
        assert seen == [] and before == (Image.MAX_IMAGE_PIXELS, list(warnings.filters))


class TestDamage:
    @pytest.mark.parametrize("name", SAMPLES)
    def test_cut_anywhere(self, name: str) -> None:
        data = SAMPLES[name]
        for at in {*range(1, min(len(data), 300)), *range(300, len(data), 13), len(data) - 2, len(data) - 1}:
            with pytest.raises(ImageParseError):
                decode_image(data[:at])

    @pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about EXIF blocks that we damage
    @pytest.mark.parametrize("name", SAMPLES)
    def test_changed_bytes_raise_nothing_but_image_errors(self, name: str) -> None:
        chance = random.Random(name)
        for _ in range(250):
            data = bytearray(SAMPLES[name])
            for _ in range(chance.choice((1, 2, 8))):
                data[chance.randrange(min(len(data), chance.choice((60, 400, 10**6))))] = chance.randrange(256)
            try:
                assert decode_image(bytes(data)).image.mode == "RGB"
            except ImageError as error:
                assert error.code != "invalid_image" and len(str(error)) < 700

    @pytest.mark.parametrize("name", ["png", "png-palette", "apng"])
    def test_any_changed_byte_of_a_png_is_noticed(self, name: str) -> None:
        """Pillow skips the CRC of IDAT and shows the wrong picture."""
        for at in range(8, len(SAMPLES[name]), 11):
            data = bytearray(SAMPLES[name])
            data[at] ^= 0x10
            with pytest.raises(ImageError):
                decode_image(bytes(data))

    def test_random_bytes_after_each_magic(self) -> None:
        chance = random.Random(0)
        for data in SAMPLES.values():
            for keep in (8, 16, 30):
                with pytest.raises(ImageError):
                    decode_image(data[:keep] + chance.randbytes(200))

    def test_damaged_exif_is_told_but_the_picture_stays(self) -> None:
        data = encode(PICTURE, "PNG", exif=b"Exif\0\0XX*\0\x08\0\0\0")
        result = decode_image(data)
        assert pixels(result.image) == pixels(PICTURE) and "EXIF" in result.warnings[0]


class TestRecognition:
    @pytest.mark.parametrize(
        ("data", "name"),
        [(b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="">', "SVG"), (b"  <svg width='1'/>", "SVG"),
         (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"), (b"\0\0\0\x18ftypmif1", "HEIC"), (b"\0\0\0\x1cftypavif", "AVIF"),
         (b"\0\0\0\x1cftypmp42", "MP4"), (b"%PDF-1.7\n", "PDF"), (b"8BPS\0\1", "PSD"), (b"%!PS-Adobe-3.0 EPSF", "EPS"),
         (b"\xc5\xd0\xd3\xc6\0", "EPS"), (b"II*\0\x08\0\0\0", "TIFF"), (b"\0\0\1\0\1\0", "ICO"), (b"<html>", "HTML"),
         (b"\0" * 128 + b"DICM", "DICOM"), (b"PK\3\4zip", "ZIP"), (b"\xff\x0a\0", "JPEG XL"), (b"RIFF1234WAVE", "WAV")],
    )  # fmt: skip
    def test_other_formats_are_refused_by_name(self, data: bytes, name: str) -> None:
        with pytest.raises(UnsupportedImageError, match=f"Got: {name}"):
            decode_image(data)

    def test_hostile_bulk_is_refused_in_time(self) -> None:
        """A pattern with two open ends once needed minutes for a file of blanks, and 1-byte GIF blocks 5 s."""
        bulk = [b" " * 2**24, b"%" * 2**24, b"<" * 2**24, b"GIF89a\x08\0\x08\0\0\0\0\x21\xfe" + b"\1a" * 2**23,
                b"GIF89a\x08\0\x08\0\0\0\0" + b"x" * 2**24, b"\xff\xd8" + b"\xff" * 2**24,
                b"\xff\xd8" + b"\xff\xe0\0\2" * 2**22]  # fmt: skip
        start = time.process_time()
        for data in bulk:
            with pytest.raises(ImageError):
                decode_image(data)
        assert time.process_time() - start < 3

    def test_unknown_bytes(self) -> None:
        for data in (b"hello", b"\x89PN", b"\xff\xd8", b"\0" * 500, b"BMW is a car maker, and no bitmap."):
            with pytest.raises(ImageParseError):
                decode_image(data)

    def test_formats_can_be_narrowed_and_tiff_added(self) -> None:
        with pytest.raises(UnsupportedImageError, match="GIF"):
            decode_image(SAMPLES["gif"], ImageLimits(formats=("PNG",)))
        data, limits = encode(PICTURE, "TIFF"), ImageLimits(formats=("PNG", "TIFF"))
        assert pixels(decode_image(data, limits).image) == pixels(PICTURE)
        for at in range(1, len(data), 97):
            with pytest.raises(ImageParseError):
                decode_image(data[:at], limits)

    @pytest.mark.parametrize("name", ["apng", "webp-animated", "gif-animated"])
    def test_animations_give_the_first_frame_and_a_warning(self, name: str) -> None:
        result = decode_image(SAMPLES[name])
        first = PICTURE.quantize(16).convert("RGB") if name.startswith("gif") else PICTURE
        assert pixels(result.image) == pixels(first) and "several frames" in result.warnings[0]
        assert decode_image(SAMPLES["gif"]).warnings == ()


class TestColour:
    def test_16_bit_grey_is_rescaled_not_clipped(self) -> None:
        """Pillow's own convert turns 40000 into 255, which ruins medical images."""
        values = np.array([[0, 128, 129, 257], [32896, 40000, 65406, 65535]], dtype=np.uint16)
        expected = [(v,) * 3 for v in (0, 0, 1, 1, 128, 156, 254, 255)]
        assert decoded(encode(Image.fromarray(values), "PNG")) == expected
        assert opened(Image.frombytes("I;16B", (4, 2), values.astype(">u2").tobytes())) == expected

    def test_16_bit_colour_grey_alpha_and_colour_key(self) -> None:
        rows = b"".join(b"\0" + struct.pack(">6H", 65535, 40000, 0, 257, 32896, 300) for _ in range(2))
        assert decoded(png(2, 2, 16, 2, rows)) == [(255, 156, 0), (1, 128, 1)] * 2
        key = (b"tRNS", struct.pack(">3H", 257, 32896, 300))
        assert decoded(png(2, 2, 16, 2, rows, key)) == [(255, 156, 0), (255, 255, 255)] * 2
        rows = (b"\0" + struct.pack(">4H", 40000, 65535, 40000, 0)) * 2
        assert decoded(png(2, 2, 16, 4, rows)) == [(156, 156, 156), (255, 255, 255)] * 2
        rows, key = (b"\0" + struct.pack(">2H", 300, 301)) * 2, (b"tRNS", struct.pack(">H", 300))
        assert decoded(png(2, 2, 16, 0, rows, key)) == [(255, 255, 255), (1, 1, 1)] * 2

    def test_shallow_grey_and_its_colour_key(self) -> None:
        """PNG states the key at the file's depth; Pillow compares it with pixels scaled to 8 bits."""
        rows, key = b"\0\x1b" * 2, (b"tRNS", b"\0\1")  # 0 1 2 3
        assert decoded(png(4, 2, 2, 0, rows)) == [(v,) * 3 for v in (0, 85, 170, 255)] * 2
        assert decoded(png(4, 2, 2, 0, rows, key)) == [(v,) * 3 for v in (0, 255, 170, 255)] * 2
        assert decoded(png(2, 2, 1, 0, b"\0\x40\0\x80")) == [(0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3]
        assert decoded(png(2, 2, 1, 0, b"\0\x40\0\x80", (b"tRNS", b"\0\0"))) == [(255,) * 3] * 4

    @pytest.mark.parametrize(
        ("mode", "values", "expected", "noted"),
        [("I", [0, 100, 255, 7], [0, 100, 255, 7], False), ("I", [0, 257, 40000, 65535], [0, 1, 156, 255], False),
         ("I", [-100, 0, 100, 100], [0, 128, 255, 255], True), ("I", [0, 10**6, 10**6, 0], [0, 255, 255, 0], True),
         ("F", [0, 0.25, 0.5, 1], [0, 64, 128, 255], False), ("F", [0, 1.5, 200, 255], [0, 2, 200, 255], False),
         ("F", [0, 300, 65535, 0], [0, 1, 255, 0], False), ("F", [-1, 0, 1, 1], [0, 128, 255, 255], True),
         ("F", [-5, -5, -5, -5], [0, 0, 0, 0], True),
         ("F", [0, float("nan"), float("inf"), 1], [0, 0, 255, 255], True)],
    )  # fmt: skip
    def test_integers_and_floats_by_range(self, mode: str, values: list, expected: list, noted: bool) -> None:
        dtype = np.int32 if mode == "I" else np.float32
        result = open_image(Image.fromarray(np.array(values, dtype).reshape(2, 2)), allow_paths=False)
        assert [p[0] for p in pixels(result.image)] == expected and bool(result.warnings) is noted

    def test_a_float_picture_without_a_finite_value(self) -> None:
        with pytest.raises(ImageParseError, match="finite"):
            open_image(Image.fromarray(np.full((2, 2), np.nan, np.float32)), allow_paths=False)

    def test_alpha_lies_over_white(self) -> None:
        red = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
        red.putpixel((0, 0), (9, 9, 9, 0))
        white, half = (255, 255, 255), (255, 127, 127)
        assert decoded(encode(red, "PNG")) == [white, half, half, half] == opened(red) == opened(red.convert("RGBa"))
        assert decoded(encode(red, "WEBP", lossless=True)) == [white, half, half, half]
        grey = Image.new("LA", (2, 2), (0, 128))
        assert decoded(encode(grey, "PNG")) == [(127,) * 3] * 4 == opened(grey) == opened(grey.convert("La"))
        key = Image.new("RGB", (2, 2), (1, 2, 3))
        assert decoded(encode(key, "PNG", transparency=(1, 2, 3))) == [white] * 4

    def test_palettes(self) -> None:
        image = Image.new("P", (2, 2))
        image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 255])
        image.putdata([0, 1, 2, 1])
        solid = [(10, 20, 30), (200, 0, 0), (0, 0, 255), (200, 0, 0)]
        for name in ("PNG", "GIF", "BMP"):
            assert decoded(encode(image, name)) == solid
        holed = [solid[0], (255, 255, 255), solid[2], (255, 255, 255)]
        assert decoded(encode(image, "PNG", transparency=1)) == holed == decoded(encode(image, "GIF", transparency=1))
        assert decoded(encode(image, "PNG", transparency=b"\xff\x80\xff"))[1] == (227, 127, 127)
        image.info["transparency"] = 1
        assert opened(image) == holed and opened(image) == holed
        key = image.info.pop("transparency")  # the caller's palette is as it was:
        assert image.convert("RGBA").getpixel((key, 0)) == (*solid[1], 255)
        image.info["transparency"] = key
        assert opened(image.convert("PA")) == holed

    def test_cmyk_ycck_and_other_spaces(self) -> None:
        """Adobe stores CMYK inverted. One colour a file, so that JPEG loses next to nothing."""
        for ink, rgb in {(0, 255, 255, 0): (255, 0, 0), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0),
                         (0, 0, 0, 0): (255, 255, 255), (0, 100, 200, 50): (205, 125, 44)}.items():  # fmt: skip
            image = Image.new("CMYK", (16, 16), ink)
            assert opened(image)[0] == rgb
            assert np.abs(np.subtract(decoded(encode(image, "JPEG", quality=100)), rgb)).max() <= 2
        # YCCK: Adobe's Y, Cb, Cr are those of the ink (C, M, Y) = 255 - RGB; K is inverted; transform 2
        y, cb, cr = Image.new("RGB", (1, 1), (50, 130, 211)).convert("YCbCr").getpixel((0, 0))
        data = encode(Image.new("CMYK", (16, 16), (255 - y, 255 - cb, 255 - cr, 0)), "JPEG", quality=100)
        at = data.index(b"Adobe") + 11
        ycck = data[:at] + b"\2" + data[at + 1 :]
        assert np.abs(np.subtract(decoded(ycck), (205, 125, 44))).max() <= 3
        for mode in ("HSV", "YCbCr", "LAB", "RGBX"):
            from_mode = opened(Image.new("RGB", (2, 2), (200, 30, 60)).convert(mode))
            assert np.abs(np.subtract(from_mode, (200, 30, 60))).max() <= 4, mode
        assert (
            opened(Image.new("1", (2, 2), 1)) == [(255,) * 3] * 4
            and opened(Image.new("L", (2, 2), 7)) == [(7,) * 3] * 4
        )

    @pytest.mark.parametrize("orientation", range(0, 10))
    def test_orientation_is_applied_once(self, orientation: int) -> None:
        upright = np.asarray(noise(4, 3))
        stored = {2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
                  6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2),
                  8: np.rot90(upright, -1)}  # fmt: skip
        image = Image.fromarray(np.ascontiguousarray(stored.get(orientation, upright)))
        for name, options in (("PNG", {}), ("WEBP", {"lossless": True})):
            data = encode(image, name, exif=exif(orientation), **options)
            once = decode_image(data).image
            assert np.array_equal(np.asarray(once), upright)
            assert np.array_equal(np.asarray(open_image(once, allow_paths=False).image), upright)
            lazy = Image.open(io.BytesIO(data))
            assert np.array_equal(np.asarray(open_image(lazy, allow_paths=False).image), upright)
        jpeg = encode(image, "JPEG", exif=exif(orientation))
        assert decode_image(jpeg).image.size == (4, 3)
