"""Painting for generated scenes: backgrounds, shapes, turned sprites, photometric wear. numpy and Pillow only.

In: a numpy random generator and colours. Out: uint8 arrays. Refuses to know what is asked about a scene.
A patch is premultiplied RGBA of the object's visible box, so that pasting touches that box and nothing else.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (218, 32, 36),
    "orange": (247, 134, 12),
    "yellow": (252, 222, 36),
    "green": (44, 156, 62),
    "blue": (36, 88, 214),
    "purple": (134, 50, 176),
    "pink": (252, 138, 192),
    "brown": (118, 70, 34),
    "black": (14, 14, 16),
    "white": (250, 250, 250),
    "gray": (134, 134, 136),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "hexagon", "cross", "diamond")
BACKGROUNDS = ("solid", "gradient", "noise", "stripes", "checker", "blobs", "dimmed")

_OVERSAMPLING = 3
_RAMP_CACHE: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}


def paint_background(
    rng: np.random.Generator, size: tuple[int, int], avoid: np.ndarray, *, distance: float
) -> np.ndarray:
    """A background (H, W, 3) uint8 whose colours keep `distance` (RGB, Euclidean) from every row of `avoid` (K, 3)."""
    kind = BACKGROUNDS[int(rng.choice(len(BACKGROUNDS), p=(0.24, 0.18, 0.14, 0.1, 0.08, 0.14, 0.12)))]
    first, second = _two_colours(rng, avoid, distance, spread=0 if kind == "solid" else 70)
    width, height = size
    if kind == "solid":
        return np.broadcast_to(first.astype(np.uint8), (height, width, 3)).copy()
    if kind == "noise":
        base = np.broadcast_to(first, (height, width, 3))
        swing = int(rng.integers(6, 26))
        grain = rng.integers(-swing, swing, (height, width, 1), dtype=np.int8)
        return np.clip(base + grain, 0, 255).astype(np.uint8)
    weight = _weights(rng, size, kind)[:, :, None]
    return (first + (second - first) * weight).clip(0, 255).astype(np.uint8)


def shape_patch(name: str, colour: Rgb, side: int, angle: float) -> np.ndarray:
    """A plain shape that fits a square of `side` pixels, premultiplied RGBA."""
    big = side * _OVERSAMPLING
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    if name == "circle":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
    else:
        draw.polygon([(x * big, y * big) for x, y in _corners(name, angle)], fill=255)
    alpha = np.asarray(mask.reduce(_OVERSAMPLING), dtype=np.uint16)
    patch = np.empty((side, side, 4), dtype=np.uint8)
    patch[:, :, :3] = (alpha[:, :, None] * np.asarray(colour, dtype=np.uint16)) // 255
    patch[:, :, 3] = alpha
    return _tight(patch)


def sprite_patch(sprite: Image.Image, side: int, angle: float) -> np.ndarray:
    """A premultiplied sprite scaled so that its longer side is `side`, turned by `angle` degrees, in one resampling."""
    scale = max(sprite.size) / side
    turn = math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    width = math.ceil((sprite.width * abs(cos) + sprite.height * abs(sin)) / scale) + 2
    height = math.ceil((sprite.width * abs(sin) + sprite.height * abs(cos)) / scale) + 2
    a, b, d, e = cos * scale, -sin * scale, sin * scale, cos * scale
    c = sprite.width / 2 - a * width / 2 - b * height / 2
    f = sprite.height / 2 - d * width / 2 - e * height / 2
    turned = sprite.transform((width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC)
    # Bicubic weights overshoot: a premultiplied channel may not exceed its alpha.
    patch = np.array(turned)
    np.minimum(patch[:, :, :3], patch[:, :, 3:], out=patch[:, :, :3])
    return _tight(patch)


def paste(pixels: np.ndarray, patch: np.ndarray, x: int, y: int) -> None:
    """Lay a premultiplied patch over `pixels` (H, W, 3) in place; it must lie inside."""
    height, width = patch.shape[:2]
    under = pixels[y : y + height, x : x + width]
    kept = under.astype(np.uint16) * (255 - patch[:, :, 3:].astype(np.uint16)) // 255
    np.copyto(under, np.minimum(kept + patch[:, :, :3], 255).astype(np.uint8))


def mean_colour(patch: np.ndarray) -> np.ndarray:
    """(3,) float: the patch's average colour where it is visible."""
    total = patch.reshape(-1, 4).sum(axis=0, dtype=np.int64)
    return total[:3] * 255.0 / max(int(total[3]), 1)


def draw_shade(rng: np.random.Generator, name: str) -> Rgb:
    """A shade of a named colour that a person would still call by that name. Greys vary less: a tint would show."""
    swing = 4 if name in ("black", "white", "gray") else 10
    red, green, blue = np.clip(np.asarray(COLOURS[name]) + rng.integers(-swing, swing + 1, 3), 0, 255)
    return int(red), int(green), int(blue)


def wear(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Sometimes a mild brightness, contrast, blur or JPEG change; never so strong that a colour changes its name."""
    if rng.random() > 0.4:
        return pixels
    choice = int(rng.integers(4))
    if choice == 0:
        return np.clip(pixels * np.float32(rng.uniform(0.86, 1.1)), 0, 255).astype(np.uint8)
    if choice == 1:
        gain = np.float32(rng.uniform(0.84, 1.14))
        return np.clip((pixels - np.float32(128)) * gain + np.float32(128), 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    if choice == 2:
        return np.array(picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 0.9)))))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(55, 93)))
    return np.array(Image.open(buffer))


def _two_colours(
    rng: np.random.Generator, avoid: np.ndarray, distance: float, *, spread: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of 24 drawn pairs the first that stays clear of `avoid` at both ends and half-way; else the clearest."""
    value = rng.uniform(20, 250, (24, 1))
    tint = rng.uniform(-1, 1, (24, 3)) * rng.uniform(0, 90, (24, 1))
    first = np.clip(value + tint, 0, 255)
    second = np.clip(first + rng.uniform(-1, 1, (24, 3)) * spread, 0, 255)
    track = np.stack((first, (first + second) / 2, second), axis=1)  # (24, 3, 3)
    gap = np.linalg.norm(track[:, :, None, :] - avoid, axis=-1).min(axis=(1, 2))
    good = np.flatnonzero(gap >= distance)
    pick = int(good[0]) if good.size else int(gap.argmax())
    return first[pick], second[pick]


def _weights(rng: np.random.Generator, size: tuple[int, int], kind: str) -> np.ndarray:
    """(H, W) in 0..1: how much of the second colour stands where."""
    width, height = size
    across, down = _ramps(size)
    if kind == "blobs":
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8))
        return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    if kind == "checker":
        cell = int(rng.integers(10, 40))
        return ((np.arange(height)[:, None] // cell + np.arange(width)[None, :] // cell) % 2).astype(np.float32)
    if kind == "dimmed":
        middle_x, middle_y = rng.uniform(0.2, 0.8, 2).astype(np.float32)
        return np.minimum(np.hypot(across - middle_x, down - middle_y) * np.float32(1.4), 1)
    turn = rng.uniform(0, 2 * math.pi)
    slope = across * np.float32(math.cos(turn)) + down * np.float32(math.sin(turn))
    if kind == "stripes":
        period = np.float32(rng.uniform(0.08, 0.3))
        return (np.floor(slope / period) % 2).astype(np.float32)
    low, high = float(slope.min()), float(slope.max())
    return (slope - np.float32(low)) / np.float32(high - low)


def _ramps(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel in 0..1 as (1, W) and (H, 1); the same few sizes come again and again."""
    if size not in _RAMP_CACHE:
        width, height = size
        _RAMP_CACHE[size] = (
            np.linspace(0, 1, width, dtype=np.float32)[None, :],
            np.linspace(0, 1, height, dtype=np.float32)[:, None],
        )
    return _RAMP_CACHE[size]


def _corners(name: str, angle: float) -> list[tuple[float, float]]:
    """The outline of a shape in the unit square, turned about its middle and then fitted to the square again."""
    if name == "square":
        points = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    elif name == "triangle":
        points = [(0.5, 0.0), (1.0, 0.9), (0.0, 0.9)]
    elif name == "diamond":
        points = [(0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5)]
    elif name == "hexagon":
        points = [(0.5 + 0.5 * math.cos(i * math.pi / 3), 0.5 + 0.5 * math.sin(i * math.pi / 3)) for i in range(6)]
    elif name == "cross":
        low, high = 0.33, 0.67
        points = [(low, 0), (high, 0), (high, low), (1, low), (1, high), (high, high)]
        points += [(high, 1), (low, 1), (low, high), (0, high), (0, low), (low, low)]
    elif name == "star":
        radii = [0.5 if i % 2 == 0 else 0.2 for i in range(10)]
        turns = [(radius, i * math.pi / 5) for i, radius in enumerate(radii)]
        points = [(0.5 + radius * math.sin(t), 0.5 - radius * math.cos(t)) for radius, t in turns]
    else:
        points = [_heart(i * math.pi / 20) for i in range(40)]
    turn = math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    turned = [((x - 0.5) * cos - (y - 0.5) * sin, (x - 0.5) * sin + (y - 0.5) * cos) for x, y in points]
    reach = 2 * max(max(abs(x), abs(y)) for x, y in turned)
    return [(0.5 + x / reach, 0.5 + y / reach) for x, y in turned]


def _heart(t: float) -> tuple[float, float]:
    height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return 0.5 + math.sin(t) ** 3 / 2, 0.5 - height / 34


def _tight(patch: np.ndarray) -> np.ndarray:
    """Without rows and columns that are all but invisible."""
    seen = patch[:, :, 3] > 24
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
