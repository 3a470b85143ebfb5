"""Generated scenes: a picture, what is in it, and dense labels on the model's 28-pixel cells.

`make_scene` is a pure function of (seed, size, kind): the same on every machine and in every process, given the
same artwork. It refuses to know questions (questions.py) and models. A scene's size is (height, width) like the
image's shape; boxes are x0, y0, x1, y1 with the last pixel excluded. Inside, `frame` is (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from model_core.demo.artwork import Artwork, Glyph
from model_core.demo.canvas import (
    COLOURS,
    SHAPES,
    draw_shade,
    mean_colour,
    paint_background,
    paste,
    shape_patch,
    sprite_patch,
    wear,
)
from model_core.demo.labels import CELL, CellLabels
from model_core.demo.things import THINGS
from model_core.demo.words import draw_word
from model_core.errors import ConfigError

Box = tuple[int, int, int, int]

#: A page is several lines of words: many letters to learn from, nothing to ask about. It comes when asked for only.
KINDS = ("single", "pair", "group", "shapes", "word", "page")
_KIND_SHARES = (0.32, 0.2, 0.16, 0.16, 0.16, 0.0)
#: Index 0 is background; then the things, then the shapes.
CLASS_NAMES: tuple[str, ...] = ("background", *(thing.name for thing in THINGS), *SHAPES)
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
#: Seeds from here on are never trained on.
HELD_OUT_FIRST_SEED = 2**40

_CLASS_INDEX = {name: index for index, name in enumerate(CLASS_NAMES)}
_EDGE = 3
_GAP = 4
_LEAST_ROOM = 30
_SPOTS, _DRAWS_BEFORE_SHRINKING = 32, 5
_MIN_LETTER_PIXELS = 15  # more than 14: every letter then owns at least one half cell
_THING_DISTANCE, _SHAPE_DISTANCE, _WORD_DISTANCE = 75.0, 105.0, 170.0


@dataclass(frozen=True, slots=True)
class SceneObject:
    """kind is "thing" (with a style) or "shape" (with a colour name)."""

    name: str
    kind: str
    style: str | None
    colour: str | None
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """image: uint8 (H, W, 3). word: lower case, whatever case it was drawn in.

    cell_class, cell_colour: int16 (H/28, W/28), indices into CLASS_NAMES and (from 1) COLOUR_NAMES, 0 for none.
    cell_object: int16 (H/28, W/28), which of `objects` (from 1), 0 for none.
    cell_painted, cell_shares: of CellLabels.shares, int16 and float32 (H/28, W/28).
    cell_letters, cell_spots: int16 (H/28, W/28, 2), the letter (1..26) over the left and right half of a cell and
        which letter of its word it is (from 1), 0 for none.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    word: str | None
    word_box: Box | None
    kind: str
    size: tuple[int, int]
    cell_class: np.ndarray
    cell_colour: np.ndarray
    cell_letters: np.ndarray
    cell_object: np.ndarray
    cell_spots: np.ndarray
    cell_painted: np.ndarray
    cell_shares: np.ndarray

    def picture(self) -> Image.Image:
        return Image.fromarray(self.image)


@dataclass(slots=True)
class _Item:
    """An object before it is painted: `reach` is the side of the square it certainly fits into."""

    name: str
    style: str | None
    colour: str | None
    side: float
    angle: float
    x: float = 0.0
    y: float = 0.0

    @property
    def reach(self) -> float:
        if self.style is None:
            return self.side
        turn = math.radians(abs(self.angle))
        return self.side * (math.cos(turn) + math.sin(turn)) + 2


@dataclass(slots=True)
class _Letter:
    letter: str
    glyph: Glyph
    x0: int
    x1: int


@dataclass(slots=True)
class _Line:
    """A word laid out but not yet painted; x and y are those of its top left corner."""

    word: str
    letters: list[_Letter]
    width: int
    ascent: int
    height: int
    colour: np.ndarray
    x: int = 0
    y: int = 0


def make_scene(seed: int, artwork: Artwork, size: tuple[int, int] = (168, 168), kind: str | None = None) -> Scene:
    """The scene of `seed`; `size` is (height, width).

    Errors: ConfigError for sides that are no multiples of 28 (from 112 on) and for an unknown kind.
    """
    height, width = size
    frame = (width, height)
    if width % CELL or height % CELL or min(size) < 4 * CELL:
        raise ConfigError("a scene's sides must be multiples of 28", value=size, allowed="112, 140, 168, 196, 224, ...",
                          fix="Round both sides to one of these")  # fmt: skip
    if kind is not None and kind not in KINDS:
        raise ConfigError("unknown kind of scene", value=kind, allowed=", ".join(KINDS), fix="Name one of these")
    rng = np.random.default_rng((seed, width, height))
    chosen = KINDS[int(rng.choice(len(KINDS), p=_KIND_SHARES))] if kind is None else kind
    lines: list[_Line] = []
    items: list[_Item] = []
    if chosen == "single":
        items = [_thing(rng, artwork, _log_uniform(rng, 45, 0.98 * min(frame)))]
        _fit(items, frame)
        _scatter(rng, items, frame)
    elif chosen == "pair":
        items = _pair(rng, artwork, frame)
    elif chosen == "group":
        items = _group(rng, artwork, frame)
    elif chosen == "shapes":
        items = _shapes(rng, frame)
    elif chosen == "word":
        lines = [_line(rng, artwork, frame, held_out=seed >= HELD_OUT_FIRST_SEED)]
        items = _beside_word(rng, artwork, lines[0], frame)
    else:
        lines = _page(rng, artwork, frame, held_out=seed >= HELD_OUT_FIRST_SEED)
    return _paint(rng, artwork, items, lines, chosen, frame)


def _thing(rng: np.random.Generator, artwork: Artwork, side: float, name: str | None = None) -> _Item:
    chosen = name or THINGS[int(rng.integers(len(THINGS)))].name
    style = artwork.styles[int(rng.integers(len(artwork.styles)))]
    return _Item(chosen, style, None, side, float(rng.uniform(-15, 15)))


def _two_names(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(len(THINGS), 2, replace=False)
    return THINGS[int(first)].name, THINGS[int(second)].name


def _pair(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int]) -> list[_Item]:
    """Two things side by side or one above the other, far more apart along that axis than along the other."""
    axis = int(rng.integers(2))
    along, across = frame[axis], frame[1 - axis]
    items = [_thing(rng, artwork, _log_uniform(rng, 40, 110), name) for name in _two_names(rng)]
    for item in items:
        room = min(along / 2 - _EDGE - _GAP, across - 2 * _EDGE)
        item.side *= min(1.0, room / item.reach)
    for index, item in enumerate(items):
        half = item.reach / 2
        low, high = (half + _EDGE, along / 2 - half - _GAP / 2)
        place = float(rng.uniform(low, max(low, high))) + (along / 2 if index else 0)
        if index:
            place = min(along - half - _EDGE, place)
        low, high = half + _EDGE, across - half - _EDGE
        other = float(rng.uniform(low, max(low, high)))
        if index:
            before = (items[0].y if axis == 0 else items[0].x) + items[0].reach / 2
            swing = 0.45 * (place - (items[0].x if axis == 0 else items[0].y) - items[0].reach / 2)
            other = float(np.clip(np.clip(other, before - swing, before + swing), low, max(low, high)))
        item.x, item.y = (place - half, other - half) if axis == 0 else (other - half, place - half)
    return items


def _group(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int]) -> list[_Item]:
    """One to four copies of a thing; two times in three another thing stands among up to three of them: five would be
    too small to be told apart."""
    name, other = _two_names(rng)
    count = int(rng.integers(1, 5))
    side = _log_uniform(rng, 42, 78)
    items = [_thing(rng, artwork, side * float(rng.uniform(0.9, 1.1)), name) for _ in range(count)]
    if count < 4 and rng.random() < 2 / 3:
        items.append(_thing(rng, artwork, _log_uniform(rng, 42, 66), other))
    if rng.random() < 0.7:
        for item in items[:count]:
            item.style = items[0].style
    _scatter(rng, items, frame)
    return items


def _shapes(rng: np.random.Generator, frame: tuple[int, int]) -> list[_Item]:
    """One to four shapes: all different, all alike, or alike but for one."""
    count = int(rng.integers(1, 5))
    names = [SHAPES[i] for i in rng.choice(len(SHAPES), count, replace=False)]
    colours = [COLOUR_NAMES[i] for i in rng.choice(len(COLOUR_NAMES), count, replace=False)]
    plan = rng.random()
    if plan < 0.3:
        names, colours = [names[0]] * count, [colours[0]] * count
    elif plan < 0.5:
        names, colours = [names[0]] * (count - 1) + [names[-1]], [colours[0]] * (count - 1) + [colours[-1]]
    elif plan < 0.65:
        names = [names[0]] * count
    largest = (0.95 * min(frame), 100.0, 80.0, 68.0)[count - 1]
    items = [
        _Item(name, None, colour, _log_uniform(rng, 36, largest), float(rng.uniform(-12, 12)))
        for name, colour in zip(names, colours, strict=True)
    ]
    _fit(items, frame)
    _scatter(rng, items, frame)
    return items


def _line(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int], *, held_out: bool) -> _Line:
    """A word set letter by letter, narrow letters given room, so that each one owns some half cell."""
    word = draw_word(rng, held_out=held_out)
    shown = word.upper() if rng.random() < 0.5 else word
    fonts = tuple(artwork.fonts)
    font = fonts[int(rng.integers(len(fonts)))]
    room = frame[0] - 2 * _EDGE
    pixels = 2 * round(rng.uniform(16, min(36.0, room / len(word))) / 0.62 / 2)
    tracking = int(rng.integers(0, 4))
    while True:
        glyphs = [artwork.glyph(font, pixels, letter) for letter in shown]
        widths = [max(glyph.advance, glyph.mask.shape[1] + 1, _MIN_LETTER_PIXELS) + tracking for glyph in glyphs]
        if sum(widths) <= room:
            break
        pixels, tracking = pixels - 2, max(tracking - 1, 0)
    ends = np.cumsum(widths).tolist()
    letters = [
        _Letter(letter, glyph, end - width, end)
        for letter, glyph, width, end in zip(shown, glyphs, widths, ends, strict=True)
    ]
    ascent = max(-glyph.top for glyph in glyphs)
    descent = max(glyph.top + glyph.mask.shape[0] for glyph in glyphs)
    # Dark, light or strongly coloured: the background is chosen to stand off from it.
    value = rng.uniform(0, 60) if rng.random() < 0.55 else rng.uniform(205, 255)
    colour = np.clip(value + rng.uniform(-60, 60, 3), 0, 255)
    line = _Line(word, letters, ends[-1], ascent, ascent + descent, colour)
    line.x = int(rng.integers(_EDGE, frame[0] - _EDGE - line.width + 1))
    line.y = int(rng.integers(_EDGE, frame[1] - _EDGE - line.height + 1))
    return line


def _page(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int], *, held_out: bool) -> list[_Line]:
    """Lines of one colour, far enough apart that no two share a row of cells; the first always fits."""
    lines: list[_Line] = []
    top = _EDGE + int(rng.integers(0, 8))
    while True:
        line = _line(rng, artwork, frame, held_out=held_out)
        if lines and top + line.height > frame[1] - _EDGE:
            return lines
        line.y = min(top, frame[1] - _EDGE - line.height)
        line.colour = lines[0].colour if lines else line.colour
        lines.append(line)
        top = line.y + max(line.height + 2, CELL) + int(rng.integers(0, 5))


def _beside_word(rng: np.random.Generator, artwork: Artwork, line: _Line, frame: tuple[int, int]) -> list[_Item]:
    """Two times in five a thing above or below the word; the word moves to the edge to make room."""
    if rng.random() > 0.4:
        return []
    room = min(frame[1] - line.height - 2 * _GAP, frame[0]) - 2 * _EDGE
    if room < _LEAST_ROOM:
        return []
    item = _thing(rng, artwork, _log_uniform(rng, 44, 90))
    item.side *= min(1.0, room / item.reach)
    item.x = float(rng.uniform(_EDGE, max(_EDGE, frame[0] - item.reach - _EDGE)))
    slack = float(rng.uniform(0, max(0.0, room - item.reach)))
    if rng.random() < 0.5:
        line.y, item.y = _EDGE + int(slack / 2), _EDGE + slack / 2 + line.height + _GAP
    else:
        line.y, item.y = frame[1] - line.height - _EDGE - int(slack / 2), float(_EDGE)
    return [item]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))


def _fit(items: Sequence[_Item], frame: tuple[int, int]) -> None:
    for item in items:
        item.side *= min(1.0, (min(frame) - 2 * _EDGE) / item.reach)


def _scatter(rng: np.random.Generator, items: Sequence[_Item], frame: tuple[int, int]) -> None:
    """Random places without overlap; everything shrinks a little when several draws did not work out."""
    for _ in range(40):
        for _ in range(_DRAWS_BEFORE_SHRINKING):
            placed: list[_Item] = []
            for item in sorted(items, key=lambda one: -one.reach):
                if not _find_place(rng, item, placed, frame):
                    break
                placed.append(item)
            if len(placed) == len(items):
                return
        for item in items:
            item.side *= 0.95
    raise ConfigError("the objects do not fit the picture", value=(len(items), frame), allowed="a larger picture",
                      fix="Ask for a larger size")  # fmt: skip


def _find_place(rng: np.random.Generator, item: _Item, placed: Sequence[_Item], frame: tuple[int, int]) -> bool:
    """The first of some random places that is free."""
    reach = item.reach
    spots = _EDGE + rng.random((_SPOTS, 2)) * (np.asarray(frame) - 2 * _EDGE - reach)
    free = np.ones(len(spots), bool)
    for other in placed:
        at = np.array((other.x, other.y))
        free &= ((spots + reach + _GAP <= at) | (at + other.reach + _GAP <= spots)).any(axis=1)
    if free.any():
        item.x, item.y = spots[free.argmax()].tolist()
    return bool(free.any())


def _paint(
    rng: np.random.Generator, artwork: Artwork, items: Sequence[_Item], lines: Sequence[_Line], kind: str,
    frame: tuple[int, int],
) -> Scene:  # fmt: skip
    patches, avoid, distance = [], [], _THING_DISTANCE
    for item in items:
        if item.style is None:
            shade = draw_shade(rng, str(item.colour))
            patches.append(shape_patch(item.name, shade, max(int(item.side), 8), item.angle))
            avoid.append(np.asarray(shade, dtype=np.float64))
            distance = _SHAPE_DISTANCE
        else:
            patches.append(sprite_patch(artwork.sprites[item.style, item.name], max(int(item.side), 8), item.angle))
            avoid.append(mean_colour(patches[-1]))
    if lines:
        avoid, distance = [lines[0].colour], _WORD_DISTANCE
    pixels = paint_background(rng, frame, np.stack(avoid), distance=distance)
    size = (frame[1], frame[0])
    labels = CellLabels(*size)
    objects: list[SceneObject] = []
    for item, patch in zip(items, patches, strict=True):
        height, width = patch.shape[:2]
        x = int(np.clip(item.x + (item.reach - width) / 2, 0, frame[0] - width))
        y = int(np.clip(item.y + (item.reach - height) / 2, 0, frame[1] - height))
        paste(pixels, patch, x, y)
        is_a = "shape" if item.style is None else "thing"
        one = SceneObject(item.name, is_a, item.style, item.colour, (x, y, x + width, y + height))
        objects.append(one)
        colour = 0 if one.colour is None else COLOUR_NAMES.index(one.colour) + 1
        labels.add_object(len(objects), one.box, patch, _CLASS_INDEX[one.name], colour)
    boxes = [_set_line(line, pixels, labels) for line in lines]
    word, word_box = (lines[0].word, boxes[0]) if kind == "word" else (None, None)
    cells = (labels.class_, labels.colour, labels.letters, labels.object, labels.spots, *labels.shares())
    return Scene(wear(rng, pixels), tuple(objects), word, word_box, kind, size, *cells)


def _set_line(line: _Line, pixels: np.ndarray, labels: CellLabels) -> Box:
    """Paint the word and label the half cells that its letters stand on."""
    baseline = line.y + line.ascent
    for letter in line.letters:
        mask = letter.glyph.mask
        slack = letter.x1 - letter.x0 - mask.shape[1]
        x, y = line.x + letter.x0 + max(slack, 0) // 2, baseline + letter.glyph.top
        under = pixels[y : y + mask.shape[0], x : x + mask.shape[1]]
        weight = mask[:, :, None] / np.float32(255)
        np.copyto(under, (under + (line.colour - under) * weight).astype(np.uint8))
    # One band for the whole word, so that its letters lie in the same row of cells.
    band = float(np.median([-letter.glyph.top for letter in line.letters]))
    labels.add_word(baseline, band, [(one.letter, line.x + one.x0, line.x + one.x1) for one in line.letters])
    return line.x, line.y, line.x + line.width, line.y + line.height
