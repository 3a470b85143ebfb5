"""Images: untrusted bytes in; an upright 8-bit RGB picture, and Qwen2-VL's patches of it, out.

`decode_image` bounds everything before it decodes: bytes, then magic, then the size that the header
states, then completeness, and only then the pixels. Every failure is an `ImageError`; a decoder's own
exception never passes. `to_patches` and `frames_to_patches` cut what Qwen2VLImageProcessorPil cuts, in
its order, bit for bit, but keep uint8: the device normalises (`normalise` is the reference for that).

It refuses to know torch, HTTP and threads; it downloads nothing, trusts no declared media type, and
leaves Pillow's globals and the warning filters alone, since other threads may be decoding too.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose

from model_core.errors import (
    ConfigError,
    EmptyImageError,
    ImageParseError,
    ImageTooLargeError,
    ImageTooSmallError,
    InvalidRequestError,
    UnsupportedImageError,
)
from model_core.processing.image_formats import READABLE, check_whole, sniff, stated_size
from model_core.processing.sources import SHRINK, load_source

#: What Pillow's plugins raise on hostile bytes (documented, or found by fuzzing). `Warning` is here for
#: processes that turn warnings into errors: a file that Pillow warns about must not look like a crash.
_DECODER_ERRORS = (
    OSError, ValueError, TypeError, SyntaxError, struct.error, EOFError, LookupError, ArithmeticError, AttributeError,
    AssertionError, RuntimeError, MemoryError, zlib.error, Image.DecompressionBombError, Warning,
)  # fmt: skip

#: Pillow warns above this and the filters that would hush it are global, so no limit may exceed it.
_PILLOW_WARNS_ABOVE = 1024 * 1024 * 1024 // 4 // 3

_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost. `max_aspect_ratio` is long side / short side; `formats` may add "TIFF".

    `max_visual_tokens`: of all pictures and frames of one request together; None sets no limit but the context's.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 36_000_000
    max_aspect_ratio: float = 200.0
    min_side: int = 2
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    max_visual_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= _PILLOW_WARNS_ABOVE:
            allowed, fix = f"1 to {_PILLOW_WARNS_ABOVE}", "Correct it, or leave it out"
            raise ConfigError("max_pixels is out of range", value=self.max_pixels, allowed=allowed, fix=fix)
        if unknown := sorted(set(self.formats) - set(READABLE)):
            raise ConfigError("unknown image format", value=", ".join(unknown), allowed=", ".join(READABLE),
                              fix="Name some of these, or leave formats out")  # fmt: skip

    def check_visual_tokens(self, smallest: int) -> None:
        """Raises ConfigError: not even an image of `smallest` vision tokens is within the limit."""
        if self.max_visual_tokens is not None and self.max_visual_tokens < smallest:
            raise ConfigError(
                "no image is within the limit of vision tokens", value=f"max_visual_tokens={self.max_visual_tokens}",
                allowed=f"at least {smallest}, the tokens of this model's smallest image", fix="Raise that limit",
            )  # fmt: skip


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB uint8 picture that shares nothing with its source, and what the caller should be told."""

    image: Image.Image
    warnings: tuple[str, ...] = ()


def decode_image(data: bytes, limits: ImageLimits = ImageLimits()) -> DecodedImage:
    """Encoded bytes of one picture (the first frame of an animation) as upright RGB. Raises ImageError."""
    data = bytes(data)
    name, _ = read_header(data, limits)
    try:
        check_whole(name, data)
        with Image.open(BytesIO(data), formats=(name,)) as image:
            check_size(image.size, limits)  # as Pillow read it, in case that is not what we read
            image.load()
            if name == "PNG" and isinstance(image.info.get("transparency"), (int, tuple)):
                _scale_colour_key(image, bits=data[24])
            return _finish(image, "first")
    except _DECODER_ERRORS as error:
        raise _damaged(name, data) from error


def read_header(data: bytes, limits: ImageLimits) -> tuple[str, tuple[int, int]]:
    """The format and the size (width, height) that the bytes claim, both within limits. Raises ImageError."""
    if not data:
        fix = "Check that the file was written and sent whole"
        raise EmptyImageError("the image has no bytes", value="0 bytes", allowed="a whole picture file", fix=fix)
    if len(data) > limits.max_bytes:
        allowed = f"{limits.max_bytes} bytes"
        raise ImageTooLargeError("the image has too many bytes", value=len(data), allowed=allowed, fix=SHRINK)
    name, formats = sniff(data), ", ".join(limits.formats)
    if name is None:
        fix = "Check that this is a picture, and save it as one of these"
        raise ImageParseError("the bytes do not begin like an image", value=data[:8], allowed=formats, fix=fix)
    if name not in limits.formats:
        raise UnsupportedImageError("this kind of file is not read", value=name, allowed=formats, fix="Convert it")
    try:
        size = stated_size(name, data)
    except _DECODER_ERRORS as error:
        raise _damaged(name, data) from error
    check_size(size, limits)
    return name, size


def check_complete(data: bytes, limits: ImageLimits = ImageLimits()) -> None:
    """That the header is within limits and the file reaches its own end; no pixel is decoded. Raises ImageError."""
    name, _ = read_header(data, limits)
    try:
        check_whole(name, data)
    except _DECODER_ERRORS as error:
        raise _damaged(name, data) from error


def stated_mode(data: bytes) -> str:
    """Pillow's name of the colours that the header states, "" where it can't say. Decodes no pixel."""
    try:
        with Image.open(BytesIO(data), formats=READABLE) as image:
            return image.mode
    except _DECODER_ERRORS:
        return ""


def _damaged(name: str, data: bytes) -> ImageParseError:
    seen, allowed = f"{name}, {len(data)} bytes", "a whole file, from its first byte to its own end"
    return ImageParseError(
        "the image is damaged or incomplete", value=seen, allowed=allowed, fix="Save or send it again"
    )


def check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    """(width, height). Raises ImageTooLargeError, ImageTooSmallError; ImageParseError where a side is 0."""
    width, height = size
    seen, short = f"{width} x {height}", min(size)
    if short < 1:
        allowed = "a width and a height above 0"
        raise ImageParseError("the image states no size", value=seen, allowed=allowed, fix="Save or send it again")
    if width * height > limits.max_pixels:
        allowed, fix = f"{limits.max_pixels} pixels", "Scale it down first"
        raise ImageTooLargeError("the image has too many pixels", value=seen, allowed=allowed, fix=fix)
    if max(size) > limits.max_aspect_ratio * short:
        allowed = f"a long side of at most {limits.max_aspect_ratio:g} times the short side"
        raise ImageTooLargeError("the image is too long and thin", value=seen, allowed=allowed, fix="Crop it first")
    if short < limits.min_side:
        allowed = f"sides of at least {limits.min_side} pixels"
        raise ImageTooSmallError("the image is too small", value=seen, allowed=allowed, fix="Scale it up first")


def _scale_colour_key(image: Image.Image, *, bits: int) -> None:
    """PNG states the transparent colour at the file's depth, and Pillow hands it on without scaling it."""
    key = image.info["transparency"]
    if image.mode == "L" and bits < 8:
        image.info["transparency"] = key * 255 // ((1 << bits) - 1)
    elif image.mode == "RGB" and bits == 16:  # Pillow keeps the high byte of 16-bit colour
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _finish(image: Image.Image, frame: str) -> DecodedImage:
    """Colour, then orientation, of a picture whose size has been checked; `frame` is named if there are more."""
    notes = []
    if getattr(image, "format", None) in ("PNG", "GIF", "WEBP", "TIFF") and getattr(image, "is_animated", False):
        notes.append(f"The image has several frames; only the {frame} one is used.")
    try:
        orientation = image.getexif().get(0x0112, 1)
    except _DECODER_ERRORS:
        orientation = 1
        notes.append("The EXIF block is damaged; the orientation in it was ignored.")
    rgb = _to_rgb(image, notes)
    # Not ImageOps.exif_transpose: it also rewrites the EXIF block, and fails on odd but harmless ones.
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if method is not None:
        rgb = rgb.transpose(method)
    rgb.info = {}  # no EXIF left that a later reader could apply a second time
    return DecodedImage(rgb, tuple(notes))


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Any Pillow mode as RGB, alpha over white (as transformers does), nothing clipped; never the same object.

    CMYK is converted without a profile, and CMYK JPEGs are taken as inverted (Adobe's way), as browsers do.
    """
    key = image.info.get("transparency")
    if image.mode == "P":
        image = image.copy()  # converting a palette with transparency alters the source's palette
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        raw = np.asarray(image)
        grey = _grey_to_uint8(raw, image.mode, notes)
        if isinstance(key, (int, float)):
            grey[raw == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBa", "La"):  # premultiplied
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or (key is not None and image.mode in ("1", "L", "P", "RGB")):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image.convert("RGB")  # a copy where it is RGB already


def _grey_to_uint8(values: np.ndarray, mode: str, notes: list[str]) -> np.ndarray:
    """Deep grey as uint8 by its range.

    I;16: 0..65535 is black to white. I and F state no range, so the narrowest of these that holds every
    value is taken: 0..1 (F only), 0..255, 0..65535; failing all, the picture's own minimum to maximum,
    with a note. NaN is the minimum; an infinity is the nearest finite value.
    """
    if mode.startswith("I;16"):
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    grey = values.astype(np.float64)
    finite = grey[np.isfinite(grey)]
    if finite.size == 0:
        allowed, fix = "a number in at least one pixel", "Check how it was made: every value is NaN or infinite"
        raise ImageParseError("the image holds no finite value", value=f"mode {mode}", allowed=allowed, fix=fix)
    low, high = float(finite.min()), float(finite.max())
    if finite.size < grey.size:
        notes.append("Values that are not finite were replaced.")
        grey = np.nan_to_num(grey, nan=low, posinf=high, neginf=low)
    ranges = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is None:
        notes.append(f"Values from {low:g} to {high:g} were stretched to black and white.")
        grey, top = grey - low, (high - low) or 1.0
    return np.rint(grey * 255.0 / top).astype(np.uint8)


def open_image(source: object, limits: ImageLimits = ImageLimits(), *, allow_paths: bool) -> DecodedImage:
    """Bytes, a PIL image (copied), a data URL, or, where `allow_paths`, a path or file:// URL. Raises ImageError.

    `allow_paths` is for code that runs as its own user; a server never sets it (hostile.md, R2).
    """
    return decode_source(load_source(source, limits.max_bytes, allow_paths=allow_paths), limits)


def decode_source(source: bytes | Image.Image, limits: ImageLimits = ImageLimits()) -> DecodedImage:
    """What `load_source` gave, decoded. Raises ImageError."""
    if isinstance(source, Image.Image):
        check_size(source.size, limits)
        try:
            return _finish(source, "current")
        except _DECODER_ERRORS as error:
            raise ImageParseError("the PIL image can't be read", value=f"mode {source.mode}, {source.size}",
                                  allowed="one that PIL loads", fix="Convert it to RGB first") from error  # fmt: skip
    return decode_image(source, limits)


@dataclass(frozen=True)
class PatchSpec:
    """How Qwen2-VL cuts a picture; the defaults are its processor's."""

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: Resampling = Resampling.BICUBIC

    @property
    def factor(self) -> int:
        """Pixels along one side of a vision token; resized sides are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def min_image_tokens(self) -> int:
        """Vision tokens of the smallest image: what is smaller is enlarged to it."""
        return max(1, math.ceil(min(self.min_pixels, self.max_pixels) / self.factor**2))

    def within(self, max_pixels: int | None) -> PatchSpec:
        """With a smaller budget, never with a larger one."""
        if max_pixels is None:
            return self
        return replace(self, max_pixels=min(self.max_pixels, max(max_pixels, self.factor**2)))


@dataclass(frozen=True, eq=False)
class Patches:
    """pixels: uint8 (t*h*w, C*T*P*P), the processor's `pixel_values` before rescale and normalise; grid: (t, h, w).

    A still picture is stored with its frame repeated T times, so that pictures and videos have one layout.
    Rows run over t, then blocks of merge_size x merge_size patches, then the patches of a block.
    """

    pixels: np.ndarray
    grid: tuple[int, int, int]


def smart_resize(height: int, width: int, spec: PatchSpec = PatchSpec()) -> tuple[int, int]:
    """(height, width) as multiples of the factor, near the aspect ratio, within the pixel budget.

    Equal to transformers.models.qwen2_vl's function of that name, Python's half-to-even rounding included.
    """
    short, factor = min(height, width), spec.factor
    if short < 1:
        raise ImageTooSmallError("the image has no pixels", value=f"{width} x {height}",
                                 allowed="a width and a height above 0", fix="Check how it was cropped")  # fmt: skip
    if max(height, width) > 200 * short:
        seen, allowed = f"{width} x {height}", "a long side of at most 200 times the short side"
        raise ImageTooLargeError("the image is too long and thin", value=seen, allowed=allowed, fix="Crop it first")
    rounded = (round(height / factor) * factor, round(width / factor) * factor)
    area = rounded[0] * rounded[1]
    if area > spec.max_pixels:
        shrink = math.sqrt(height * width / spec.max_pixels)
        return (max(factor, math.floor(height / shrink / factor) * factor),
                max(factor, math.floor(width / shrink / factor) * factor))  # fmt: skip
    if area < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


def num_patches(height: int, width: int, spec: PatchSpec = PatchSpec()) -> int:
    """Patches of a still picture of this size; vision tokens are this / merge_size ** 2."""
    new_height, new_width = smart_resize(height, width, spec)
    return (new_height // spec.patch_size) * (new_width // spec.patch_size)


def to_patches(image: Image.Image, spec: PatchSpec = PatchSpec(), max_pixels: int | None = None) -> Patches:
    """One RGB picture. `max_pixels` can lower the spec's budget for this picture, never raise it."""
    return frames_to_patches([image], spec, max_pixels)


def frames_to_patches(
    frames: Sequence[Image.Image], spec: PatchSpec = PatchSpec(), max_pixels: int | None = None
) -> Patches:
    """A video's RGB frames, each within the budget of a picture; a short last group repeats the last frame."""
    spec = spec.within(max_pixels)
    height, width = one_size([frame.size for frame in frames], spec)
    return cut_patches([frame.resize((width, height), resample=spec.resample) for frame in frames], spec)


def one_size(sizes: Sequence[tuple[int, int]], spec: PatchSpec) -> tuple[int, int]:
    """(height, width) that frames of these (width, height) are resized to. Raises InvalidRequestError if to several."""
    if not sizes:
        raise InvalidRequestError("the video has no frames", value=0, allowed="at least one frame", fix="Send a frame")
    targets = {smart_resize(height, width, spec) for width, height in sizes}
    if len(targets) > 1:
        seen = ", ".join(f"{width} x {height}" for height, width in sorted(targets))
        raise InvalidRequestError("the frames of a video differ in size", value=seen, allowed="one size after resizing",
                                  fix="Crop or scale them to one size first")  # fmt: skip
    return targets.pop()


def cut_patches(frames: Sequence[Image.Image], spec: PatchSpec) -> Patches:
    """Frames that have been resized already, all alike.

    Colours are taken apart first: rows of one colour then move as wholes, in less than half of the time for a
    megapixel, and a still picture's repeated frame is written without a copy of it.
    """
    size, merge, period = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    width, height = frames[0].size
    planes = np.empty((len(frames), 3, height, width), dtype=np.uint8)
    for plane, frame in zip(planes, frames, strict=True):
        plane[...] = np.asarray(frame).transpose(2, 0, 1)
    blocks = planes.reshape(len(frames), 3, height // spec.factor, merge, size, width // spec.factor, merge, size)
    blocks = blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7)  # (n, h/m, w/m, m, m, C, P, P)
    steps = -(-len(frames) // period)
    pixels = np.empty((steps, *blocks.shape[1:6], period, size, size), dtype=np.uint8)
    for index in range(steps * period):
        pixels[index // period, ..., index % period, :, :] = blocks[min(index, len(frames) - 1)]
    grid = (steps, height // size, width // size)
    return Patches(pixels.reshape(math.prod(grid), -1), grid)


def normalise(pixels: np.ndarray, spec: PatchSpec = PatchSpec()) -> np.ndarray:
    """uint8 patches (N, C*T*P*P) as the processor's float32 `pixel_values`, bit for bit.

    A table of the 256 possible values per channel: rescaled in float64, rounded to float32, then
    normalised in float32, in transformers' order of operations.
    """
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(spec.image_mean, np.float32), np.array(spec.image_std, np.float32)
    table = (unit[None, :] - mean[:, None]) / std[:, None]  # (C, 256)
    channels = pixels.reshape(len(pixels), 3, -1)
    return np.stack([table[c][channels[:, c]] for c in range(3)], axis=1).reshape(pixels.shape)
