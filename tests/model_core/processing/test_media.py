"""What a request's pictures and videos cost is known before a pixel is decoded, and errors name their place."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from model_core.errors import (
    ContextLengthError,
    ImageParseError,
    ImageTooLargeError,
    InputError,
    InvalidRequestError,
    UnsupportedImageError,
)
from model_core.processing import media
from model_core.processing.batch import InputFormat, ModelInputs, prepare_inputs
from model_core.processing.images import ImageLimits, PatchSpec, smart_resize
from model_core.types import ChatMessage, ImagePart, Part, TextPart, VideoPart
from tests.model_core import tiny


def encode(width: int = 64, height: int = 64, name: str = "PNG", seed: int = 0, **options: object) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, name, **options)
    return buffer.getvalue()


def turned(width: int, height: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    return encode(width, height, "JPEG", exif=tags)


@pytest.fixture(scope="module")
def fmt() -> InputFormat:
    return tiny.encoder().format


def prepare(fmt: InputFormat, *parts: Part, limits: ImageLimits | None = None, **more: object) -> ModelInputs:
    fmt = replace(fmt, limits=limits or ImageLimits(), allow_paths=False)
    return prepare_inputs([ChatMessage("system", (TextPart("s"),)), ChatMessage("user", parts)], fmt, **more)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every source that was decoded."""
    seen: list[object] = []
    original = media.decode_source
    monkeypatch.setattr(media, "decode_source", lambda s, limits: seen.append(s) or original(s, limits))
    return seen


def test_too_many_vision_tokens_are_refused_with_the_counts_before_any_decode(
    fmt: InputFormat, decoded: list[object]
) -> None:
    parts = [ImagePart(encode(112, 112)), TextPart("?"), VideoPart((encode(), encode(), encode()))]
    counts = prepare(fmt, *parts).num_image_tokens
    assert counts == 16 + 2 * 4
    num_decoded = len(decoded)
    assert prepare(fmt, *parts, limits=ImageLimits(max_visual_tokens=24)).num_image_tokens == 24
    with pytest.raises(ImageTooLargeError, match=r"24 tokens \(16, 8\)\. Allowed: 23") as caught:
        prepare(fmt, *parts, limits=ImageLimits(max_visual_tokens=23))
    assert caught.value.param == "messages"
    assert len(decoded) == 2 * num_decoded


def test_a_prompt_past_the_context_is_refused_before_any_decode(fmt: InputFormat, decoded: list[object]) -> None:
    fits = prepare(fmt, ImagePart(encode()), TextPart("?"), max_context=1000)
    decoded.clear()
    with pytest.raises(ContextLengthError, match="4 image"):
        prepare(fmt, ImagePart(encode()), TextPart("?"), max_context=len(fits.input_ids) - 1)
    assert decoded == []
    assert prepare(fmt, ImagePart(encode()), TextPart("?"), max_context=len(fits.input_ids)).num_image_tokens == 4


def test_a_bad_header_of_the_last_picture_spares_the_others(fmt: InputFormat, decoded: list[object]) -> None:
    with pytest.raises(UnsupportedImageError) as caught:
        prepare(fmt, ImagePart(encode()), ImagePart(b"%PDF-1.7"))
    assert caught.value.param == "messages[1].content[1]" and decoded == []


@pytest.mark.parametrize(
    ("parts", "param", "kind"),
    [
        ([TextPart("?"), ImagePart(encode()[:-30])], "messages[1].content[1]", ImageParseError),
        ([VideoPart((encode(), encode()[:-30]))], "messages[1].content[0].video[1]", ImageParseError),
        ([VideoPart((encode(), b"II*\0"))], "messages[1].content[0].video[1]", UnsupportedImageError),
        ([VideoPart((encode(), encode(96, 64)))], "messages[1].content[0]", InvalidRequestError),
        ([TextPart("?"), VideoPart(())], "messages[1].content[1]", InvalidRequestError),
        ([VideoPart((encode(64, 96, "JPEG"), turned(64, 96)))], "messages[1].content[0]", InvalidRequestError),
    ],
)
def test_errors_name_the_part(fmt: InputFormat, parts: list[Part], param: str, kind: type[InputError]) -> None:
    with pytest.raises(InputError) as caught:
        prepare(fmt, *parts)
    assert caught.value.param == param
    assert type(caught.value) is kind


def test_a_video_is_what_its_frames_are(fmt: InputFormat) -> None:
    """Also where they are turned: one row of patches a frame pair, and a still picture is its frame twice."""
    frames = tuple(turned(96, 64) for _ in range(2))
    video, still = prepare(fmt, VideoPart(frames)), prepare(fmt, ImagePart(frames[0]))
    assert video.grids == still.grids == ((1, 6, 4),)
    assert np.array_equal(video.pixels, still.pixels)
    assert video.media.image_pixels == (64 * 96,) * 2


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (900, 300), (57, 57)])
@pytest.mark.parametrize("spec", [PatchSpec(), PatchSpec(min_pixels=12_544, max_pixels=19_600)])
def test_low_detail_is_a_small_budget(size: tuple[int, int], spec: PatchSpec) -> None:
    budget = media.detail_pixels("low", spec)
    assert spec.min_pixels <= budget < spec.max_pixels
    height, width = smart_resize(size[1], size[0], spec.within(budget))
    assert height * width <= budget
    assert media.detail_pixels("auto", spec) is None and media.detail_pixels("high", spec) is None


def test_detail_changes_the_tokens_of_pictures_and_videos(fmt: InputFormat) -> None:
    big = encode(300, 300)
    counts = {d: prepare(fmt, ImagePart(big, detail=d)).num_image_tokens for d in ("low", "auto", "high")}
    assert counts["low"] < counts["auto"] == counts["high"]
    assert prepare(fmt, VideoPart((big,), detail="low")).num_image_tokens == counts["low"]
    with pytest.raises(InvalidRequestError, match="low, auto, high"):
        ImagePart(big, detail="huge")


@pytest.mark.parametrize("fps", [0, -1, 1e-9, 1e9, float("nan"), float("inf"), True, "2"])
def test_frame_rates_that_no_position_can_express(fps: object) -> None:
    with pytest.raises(InvalidRequestError, match="fps"):
        VideoPart((b"",), fps)


def test_extreme_frame_rates_are_placed(fmt: InputFormat) -> None:
    frames = tuple(encode(seed=i) for i in range(6))
    for fps in (0.001, 1000.0):
        positions = prepare(fmt, VideoPart(frames, fps)).positions
        assert positions.min() == 0 and positions.max() < 10**5


def test_stages_are_timed_by_the_clock_that_was_given(fmt: InputFormat) -> None:
    ticks = itertools.count()
    seconds = prepare(fmt, VideoPart((encode(), encode())), clock=lambda: float(next(ticks))).media.stage_seconds
    assert seconds == {"decode": 2.0, "resize": 2.0, "patchify": 1.0}
    assert prepare(fmt, TextPart("?")).media == media.MediaReport()


def test_one_full_picture_at_a_time(fmt: InputFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen frames of 36 megapixels were 1.7 GB when all were decoded before the first was resized."""
    order: list[str] = []
    original = media.decode_source

    def note(source: object, limits: ImageLimits):
        order.append("decode")
        return original(source, limits)

    resize = Image.Image.resize
    monkeypatch.setattr(media, "decode_source", note)
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: order.append("resize") or resize(*a, **k))
    prepare(fmt, VideoPart((encode(), encode(seed=1))), ImagePart(encode(seed=2)))
    assert order == ["decode", "resize"] * 3
