"""Pictures cut and changed at random never cost more than a 400: every error has a rule, and nothing else comes out."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from model_core.errors import DualVisionError
from model_core.processing.images import ImageLimits
from model_core.types import ChatMessage, GenerationRequest, ImagePart, VideoPart
from service.errors import rule_for
from tests.model_core import tiny


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (29, 31, 3), dtype=np.uint8))
SEEDS = {
    "PNG": encode(PICTURE, "PNG"),
    "PNG palette": encode(PICTURE.quantize(9), "PNG", transparency=3),
    "PNG 16 bits": encode(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70), "PNG"),
    "APNG": encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(180)]),
    "JPEG": encode(PICTURE, "JPEG", exif=turned()),
    "JPEG progressive CMYK": encode(PICTURE.convert("CMYK"), "JPEG", progressive=True),
    "GIF": encode(PICTURE.quantize(16), "GIF", save_all=True, append_images=[PICTURE.rotate(180).quantize(16)]),
    "WEBP": encode(PICTURE, "WEBP", exif=turned()),
    "WEBP animated": encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)], lossless=True),
    "BMP": encode(PICTURE, "BMP"),
    "BMP palette": encode(PICTURE.quantize(16), "BMP"),
}


@pytest.fixture(scope="module")
def engine():
    encoder = tiny.encoder()
    encoder.configure(ImageLimits(max_pixels=10_000, max_visual_tokens=64))
    return encoder.engine


def damage(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    kind = chance.randrange(4)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:  # a piece in another place
        start, end = sorted(chance.randrange(len(data)) for _ in range(2))
        at = chance.randrange(len(data))
        return data[:at] + data[start:end] + data[at:]
    for _ in range(chance.choice((1, 2, 8))):
        # Headers are worth more tries than pixels; lengths are worth extreme values.
        at = chance.randrange(min(len(changed), chance.choice((40, 200, 10**6))))
        changed[at] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
    return bytes(changed)


def fuzz(engine, name: str, rounds: int) -> int:
    chance, num_read = random.Random(name), 0
    for i in range(rounds):
        data = damage(SEEDS[name], chance)
        part = VideoPart((SEEDS[name], data)) if i % 10 == 0 else ImagePart(data, detail=chance.choice(("low", "auto")))
        try:
            engine.prepare(GenerationRequest("f", (ChatMessage("user", (part,)),)))
            num_read += 1
        except DualVisionError as error:
            rule = rule_for(error)
            assert rule.status == 400 and rule.code != "invalid_image", error
            assert error.param.startswith("messages[0].content[0]"), error
            assert len(str(error)) < 700
    return num_read


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about EXIF blocks that we damage


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_pictures(engine, name: str) -> None:
    assert fuzz(engine, name, 300) < 250, "most of what was damaged should be noticed, or nothing was tested"


@pytest.mark.heavy
@pytest.mark.parametrize("name", SEEDS)
def test_many_damaged_pictures(engine, name: str) -> None:
    fuzz(engine, name, 20_000)
