"""Artwork that needs neither npm nor a network: every thing is a plain glyph in a colour of its own."""

from __future__ import annotations

import colorsys

import pytest
from PIL import Image, ImageDraw

from model_core.demo.artwork import STYLES, Artwork, to_sprite
from model_core.demo.things import THINGS


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


@pytest.fixture(scope="session")
def artwork() -> Artwork:
    return synthetic_artwork()
