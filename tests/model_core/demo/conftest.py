"""Artwork that needs neither npm nor a network: every thing is a plain glyph in a colour of its own."""

from __future__ import annotations

import colorsys
import functools
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from model_core.demo.artwork import STYLES, Artwork, to_sprite
from model_core.demo.batches import SceneSource
from model_core.demo.build import demo_recipe
from model_core.demo.things import THINGS
from model_core.processing.batch import InputFormat
from model_core.training.config import TrainConfig

#: The demo's recipe on a model, pictures and steps that take a second.
SMALL = (
    "new_model.options.hidden=128",
    "new_model.options.llm_layers=1",
    "new_model.options.vision_hidden=64",
    "new_model.options.vision_layers=2",
    "new_model.options.dinov2_layers=1",
    "batch_source.name=tests.model_core.demo.conftest:synthetic_source",
    "batch_source.options.sizes=[[112, 112]]",
    "batch_size=2",
    "num_workers=0",
    "precision=float32",
)


@functools.cache
def synthetic_artwork() -> Artwork:
    """A disc or a box a thing, with a bar whose place depends on the thing; Pillow's own typeface."""
    sprites = {}
    for index, thing in enumerate(THINGS):
        red, green, blue = (int(255 * part) for part in colorsys.hsv_to_rgb(index / len(THINGS), 0.8, 0.9))
        for style in STYLES:
            picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            draw = ImageDraw.Draw(picture)
            outline = draw.ellipse if style == "google" else draw.rectangle
            outline((2, 2, 61, 61), fill=(red, green, blue, 255))
            draw.rectangle((10 + index % 30, 28, 16 + index % 30, 36), fill=(0, 0, 0, 255))
            sprites[style, thing.name] = to_sprite(picture)
    return Artwork(sprites, {"built-in": None})


def synthetic_source(config: TrainConfig, fmt: InputFormat, **options: Any) -> SceneSource:
    """A `batch_source` on the artwork of this file."""
    return SceneSource(config, fmt, artwork=synthetic_artwork(), **options)


def small_recipe(work: Path, *overrides: str, scale: float = 0.002) -> TrainConfig:
    return demo_recipe(work, scale=scale, device="cpu", overrides=(*SMALL, *overrides))


@pytest.fixture(scope="session")
def artwork() -> Artwork:
    return synthetic_artwork()
