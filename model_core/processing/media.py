"""The pictures and videos of one request -> patches, in two passes: every header first, then pixels one at a time.

In: ImageParts and VideoParts with the names of their places; out: patches in their order, and a `MediaReport`. Counts,
sizes and the request's vision tokens are judged from headers, so nothing is decoded for a request that will be
refused. A frame is resized as soon as it is decoded: only one full picture is in memory at any time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from model_core.errors import ImageTooLargeError, InputError
from model_core.processing.images import (
    ImageLimits,
    Patches,
    PatchSpec,
    cut_patches,
    decode_source,
    one_size,
    read_header,
)
from model_core.processing.sources import load_source
from model_core.types import Detail, ImagePart, VideoPart
from model_core.vision_tokens import Grid

Clock = Callable[[], float]
Medium = ImagePart | VideoPart

#: `detail: low` allows 256 vision tokens of Qwen2.5-VL (28 x 28 pixels each), or a quarter of a smaller budget.
_LOW_DETAIL_PIXELS = 256 * 28 * 28


def no_clock() -> float:
    """For callers that measure nothing."""
    return 0.0


@dataclass(frozen=True, slots=True)
class MediaReport:
    """warnings: of each picture or video. image_pixels: width x height of each picture and frame as it came.

    stage_seconds: decode, resize, patchify, each over all of them.
    """

    warnings: tuple[tuple[str, ...], ...] = ()
    image_pixels: tuple[int, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedMedium:
    """One medium before it is decoded: its frames as bytes or PIL images, and the patch grid they will become."""

    place: str
    frame_places: tuple[str, ...]
    sources: tuple[bytes | Image.Image, ...]
    spec: PatchSpec
    grid: Grid


def open_media(
    media: Sequence[tuple[str, Medium]],
    spec: PatchSpec,
    limits: ImageLimits,
    *,
    allow_paths: bool,
    tokens_per_cell: int,
    check: Callable[[Sequence[Grid]], None],
    clock: Clock,
) -> tuple[list[Patches], MediaReport]:
    """(place, part) of each -> its patches.

    Args:
        check: called with the patch grids before anything is decoded, and with those that came of it.
    Raises:
        ImageError, InvalidRequestError: with `param` naming the part; whatever `check` raises.
    """
    planned = plan_media(media, spec, limits, allow_paths=allow_paths)

    def check_all(grids: Sequence[Grid]) -> None:
        _check_visual_tokens(grids, spec.merge_size, tokens_per_cell, limits.max_visual_tokens)
        check(grids)

    check_all([one.grid for one in planned])
    watch = _Watch(clock)
    opened = [_decode(one, limits, watch) for one in planned]
    patches = [found for found, _, _ in opened]
    check_all([found.grid for found in patches])  # in case a decoder saw another size than the header's
    pixels = tuple(count for _, _, counts in opened for count in counts)
    return patches, MediaReport(tuple(notes for _, notes, _ in opened), pixels, dict(watch.seconds))


def plan_media(
    media: Sequence[tuple[str, Medium]], spec: PatchSpec, limits: ImageLimits, *, allow_paths: bool
) -> list[PlannedMedium]:
    """The headers alone: every source read, nothing decoded. Raises as `open_media` does."""
    return [_plan(place, part, spec, limits, allow_paths=allow_paths) for place, part in media]


def detail_pixels(detail: Detail, spec: PatchSpec) -> int | None:
    """The pixel budget that a level of detail stands for; None is the spec's own."""
    if detail != "low":
        return None
    # One more, since `smart_resize` rounds a square that fills its budget exactly down by a whole row and column.
    return max(min(_LOW_DETAIL_PIXELS, spec.max_pixels // 4), spec.min_pixels) + 1


def _plan(place: str, part: Medium, spec: PatchSpec, limits: ImageLimits, *, allow_paths: bool) -> PlannedMedium:
    spec = spec.within(detail_pixels(part.detail, spec))
    if isinstance(part, ImagePart):
        spec, frames = spec.within(part.max_pixels), (part.image,)
        places = [place]
    else:
        frames = part.frames
        places = [f"{place}.video[{i}]" for i in range(len(frames))]
    sources, sizes = [], []
    for where, frame in zip(places, frames, strict=True):
        with _named(where):
            source = load_source(frame, limits.max_bytes, allow_paths=allow_paths)
            sources.append(source)
            sizes.append(source.size if isinstance(source, Image.Image) else read_header(source, limits)[1])
    with _named(place):
        height, width = one_size(sizes, spec)
    steps = -(-len(sizes) // spec.temporal_patch_size)
    return PlannedMedium(
        place, tuple(places), tuple(sources), spec, (steps, height // spec.patch_size, width // spec.patch_size)
    )


def _decode(one: PlannedMedium, limits: ImageLimits, watch: _Watch) -> tuple[Patches, tuple[str, ...], list[int]]:
    """Patches, warnings, and the pixels of each frame."""
    notes: dict[str, None] = {}
    resized, sizes = [], []
    for place, source in zip(one.frame_places, one.sources, strict=True):
        with _named(place):
            with watch("decode"):
                decoded = decode_source(source, limits)
            with watch("resize"):
                height, width = one_size([decoded.image.size], one.spec)
                resized.append(decoded.image.resize((width, height), resample=one.spec.resample))
        notes |= dict.fromkeys(decoded.warnings)
        sizes.append(decoded.image.size)
    with _named(one.place), watch("patchify"):
        one_size(sizes, one.spec)  # turned upright, frames that were alike in their files may differ
        return cut_patches(resized, one.spec), tuple(notes), [width * height for width, height in sizes]


def _check_visual_tokens(grids: Sequence[Grid], merge_size: int, tokens_per_cell: int, most: int | None) -> None:
    counts = [t * h * w // merge_size**2 * tokens_per_cell for t, h, w in grids]
    if most is not None and sum(counts) > most:
        shown = ", ".join(map(str, counts[:8])) + (", ..." if len(counts) > 8 else "")
        raise ImageTooLargeError(
            "the images of this request have too many vision tokens together",
            value=f"{sum(counts)} tokens ({shown})",
            allowed=f"{most} tokens",
            fix="Send fewer or smaller images, or set their detail to low",
            param="messages",
        )


@contextmanager
def _named(place: str) -> Iterator[None]:
    """An error inside names this part of the request, unless it names one already."""
    try:
        yield
    except InputError as error:
        error.param = error.param or place
        raise


class _Watch:
    """Adds up the seconds of each stage."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = self._clock()
        try:
            yield
        finally:
            self.seconds[stage] += self._clock() - begin
