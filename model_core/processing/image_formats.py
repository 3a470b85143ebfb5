"""Image formats: what encoded bytes claim to be, before anything decodes them.

Bytes in; the format by its magic (`sniff`), the size that the header states (`stated_size`), and whether
the file reaches its own end (`check_whole`) out. Damage is a plain Python exception, which
`images.decode_image` turns into an ImageParseError. It refuses to know Pillow, pixels and limits.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format, or the name of a format that is only recognised to be refused, or None."""
    if name := next((name for name, pattern in _MAGIC if pattern.match(data)), None):
        return name
    # Text is searched with `in`: a pattern with two open ends takes minutes on a file of blanks.
    head = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<"):
        return "SVG" if b"<svg" in head else "HTML" if b"<html" in head or b"<!doctype html" in head else "XML"
    return "PDF" if b"%pdf-" in head[:1024] else None


def stated_size(name: str, data: bytes) -> tuple[int, int]:
    """(width, height) as the header of a READABLE format has it; reads no further than it must."""
    return _HEADERS[name](data, whole=False)


def check_whole(name: str, data: bytes) -> None:
    """Walk the file to its end mark. Pillow accepts several kinds of cut or altered file in silence."""
    _HEADERS[name](data, whole=True)


def _steps(data: bytes) -> Iterator[None]:
    """One `next` a block. Ends 20 MB of one-byte blocks, which Pillow would chew for seconds."""
    for _ in range(100_000 + len(data) // 64):
        yield
    raise ValueError("more blocks than a picture has")


def _png_header(data: bytes, *, whole: bool) -> tuple[int, int]:
    size: tuple[int, int] = struct.unpack_from(">II", data, 16)
    at, kind, steps = 8, b"", _steps(data)
    # Pillow does not check the CRC of IDAT, and lets a second IHDR change the size that was just checked.
    while whole and kind != b"IEND":
        next(steps)
        (length,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        (crc,) = struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(memoryview(data)[at + 4 : at + 8 + length]) != crc or (kind == b"IHDR") != (at == 8):
            raise ValueError("damaged PNG chunk")
        at += 12 + length
    return size


def _jpeg_header(data: bytes, *, whole: bool) -> tuple[int, int]:
    size, at, steps = (0, 0), 2, _steps(data)
    while True:
        next(steps)
        at = data.index(b"\xff", at)
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # these have no payload
            at += 2
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if any(size):
                    raise ValueError("two frame headers")
                size = struct.unpack_from(">HH", data, at + 5)[::-1]
                if not whole:
                    return size
            if marker in (0xD9, 0xDA):
                # Entropy-coded data escapes FF, so the next FF D9 is the true end. libjpeg fills a missing
                # end with grey and Pillow may call that success.
                data.index(b"\xff\xd9", at + 2 + length)
                return size
            at += 2 + length


def _gif_header(data: bytes, *, whole: bool) -> tuple[int, int]:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    seen, steps = False, _steps(data)
    while (kind := data[at]) != 0x3B:
        next(steps)
        if kind == 0x2C:
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, at + 1)
            if not seen:  # Pillow grows the canvas to the first frame
                width, height, seen = max(width, left + frame_width), max(height, top + frame_height), True
            at += 11 + (6 << (flags & 7) if flags & 0x80 else 0)
        elif kind == 0x21:
            at += 2
        else:  # Pillow skips stray bytes between blocks
            at += 1
            continue
        if seen and not whole:
            break
        while length := data[at]:
            next(steps)
            at += length + 1
        at += 1
    return width, height


def _webp_header(data: bytes, *, whole: bool) -> tuple[int, int]:
    # Read here because Pillow's plugin allocates the whole canvas in open(), before a size can be checked.
    if whole and struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise ValueError("shorter than RIFF says")
    kind = data[12:16]
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return low_w + (high_w << 16) + 1, low_h + (high_h << 16) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no image chunk")


def _bmp_header(data: bytes, *, whole: bool) -> tuple[int, int]:
    (file_size, header_size) = struct.unpack_from("<I8xI", data, 2)
    if whole and file_size > len(data):
        raise ValueError("shorter than the header says")
    width, height = struct.unpack_from("<HH" if header_size == 12 else "<Ii", data, 18)
    return width, abs(height)  # a negative height means top row first


def _tiff_header(data: bytes, *, whole: bool) -> tuple[int, int]:  # noqa: ARG001 - strips may lie anywhere
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    size = {}
    for i in range(count):
        tag, kind = struct.unpack_from(order + "HH", data, at + 2 + 12 * i)
        if tag in (256, 257):
            (size[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 10 + 12 * i)
    return size[256], size[257]


_HEADERS: dict[str, Callable[..., tuple[int, int]]] = {
    "PNG": _png_header, "JPEG": _jpeg_header, "WEBP": _webp_header, "GIF": _gif_header, "BMP": _bmp_header,
    "TIFF": _tiff_header,
}  # fmt: skip

#: The formats that can be decoded; "TIFF" only where the limits add it.
READABLE = tuple(_HEADERS)

#: First match wins; every pattern has a fixed length. What is not in _HEADERS is recognised to be refused by name.
_MAGIC: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (name, re.compile(pattern, re.DOTALL | re.IGNORECASE))
    for name, pattern in (
        ("PNG", rb"\x89PNG\r\n\x1a\n"), ("JPEG", rb"\xff\xd8\xff"), ("WEBP", rb"RIFF....WEBP"), ("GIF", rb"GIF8[79]a"),
        ("BMP", rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0"), ("TIFF", rb"II\*\0|MM\0\*"),
        ("AVIF", rb"....ftypavi[fs]"), ("HEIC", rb"....ftyp(hei|hev|mif1|msf1)"), ("MP4 or MOV video", rb"....ftyp"),
        ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "), ("JPEG 2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "), ("PSD", rb"8BPS"),
        ("EPS or PostScript", rb"%!PS|\xc5\xd0\xd3\xc6"), ("ICO", rb"\0\0[\x01\x02]\0"),
        ("DICOM", rb".{128}DICM"),
        ("WAV or AVI", rb"RIFF....(WAVE|AVI )"),
        ("WebM or Matroska", rb"\x1a\x45\xdf\xa3"), ("ZIP", rb"PK\x03\x04"), ("GZIP", rb"\x1f\x8b\x08"),
        ("QOI", rb"qoif"),
    )
)  # fmt: skip
