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
from model_core.demo.places import EDGE, GAP, Item, fit, scatter, set_in_rows
from model_core.demo.things import THINGS
from model_core.demo.words import draw_word
from model_core.errors import ConfigError

Box = tuple[int, int, int, int]

#: A page is several lines of words and a crowd many things of a few kinds: much to learn from at once, nothing to ask
#: about. They come when asked for only.
KINDS = ("single", "pair", "group", "shapes", "word", "page", "crowd")
_KIND_SHARES = (0.32, 0.2, 0.16, 0.16, 0.16, 0.0, 0.0)
#: Index 0 is background; then the things, then the shapes.
CLASS_NAMES: tuple[str, ...] = ("background", *(thing.name for thing in THINGS), *SHAPES)
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
#: Seeds from here on are never trained on.
HELD_OUT_FIRST_SEED = 2**40

_CLASS_INDEX = {name: index for index, name in enumerate(CLASS_NAMES)}
_LEAST_ROOM = 30
_CROWD_FIELD = 44
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
    items: list[Item] = []
    if chosen == "single":
        items = [_thing(rng, artwork, _log_uniform(rng, 45, 0.98 * min(frame)))]
        fit(items, frame)
        scatter(rng, items, frame)
    elif chosen == "pair":
        items = _pair(rng, artwork, frame)
    elif chosen == "group":
        items = _group(rng, artwork, frame, held_out=seed >= HELD_OUT_FIRST_SEED)
    elif chosen == "shapes":
        items = _shapes(rng, frame)
    elif chosen == "crowd":
        items = _crowd(rng, artwork, frame)
    elif chosen == "word":
        lines = [_line(rng, artwork, frame, held_out=seed >= HELD_OUT_FIRST_SEED)]
        items = _beside_word(rng, artwork, lines[0], frame)
    else:
        lines = _page(rng, artwork, frame, held_out=seed >= HELD_OUT_FIRST_SEED)
    return _paint(rng, artwork, items, lines, chosen, frame)


def _thing(rng: np.random.Generator, artwork: Artwork, side: float, name: str | None = None) -> Item:
    chosen = name or THINGS[int(rng.integers(len(THINGS)))].name
    style = artwork.styles[int(rng.integers(len(artwork.styles)))]
    return Item(chosen, style, None, side, float(rng.uniform(-15, 15)))


def _two_names(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(len(THINGS), 2, replace=False)
    return THINGS[int(first)].name, THINGS[int(second)].name


def _pair(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int]) -> list[Item]:
    """Two things side by side or one above the other, far more apart along that axis than along the other."""
    axis = int(rng.integers(2))
    along, across = frame[axis], frame[1 - axis]
    items = [_thing(rng, artwork, _log_uniform(rng, 40, 110), name) for name in _two_names(rng)]
    for item in items:
        room = min(along / 2 - EDGE - GAP, across - 2 * EDGE)
        item.side *= min(1.0, room / item.reach)
    for index, item in enumerate(items):
        half = item.reach / 2
        low, high = (half + EDGE, along / 2 - half - GAP / 2)
        place = float(rng.uniform(low, max(low, high))) + (along / 2 if index else 0)
        if index:
            place = min(along - half - EDGE, place)
        low, high = half + EDGE, across - half - EDGE
        other = float(rng.uniform(low, max(low, high)))
        if index:
            before = (items[0].y if axis == 0 else items[0].x) + items[0].reach / 2
            swing = 0.45 * (place - (items[0].x if axis == 0 else items[0].y) - items[0].reach / 2)
            other = float(np.clip(np.clip(other, before - swing, before + swing), low, max(low, high)))
        item.x, item.y = (place - half, other - half) if axis == 0 else (other - half, place - half)
    return items


def _group(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int], *, held_out: bool) -> list[Item]:
    """One to four copies of a thing; two times in three another thing stands among up to three of them: five would be
    too small to be told apart. Copies in two styles are what is counted worst, so more are trained on than scored."""
    name, other = _two_names(rng)
    count = int(rng.integers(1, 5))
    side = _log_uniform(rng, 42, 78)
    items = [_thing(rng, artwork, side * float(rng.uniform(0.9, 1.1)), name) for _ in range(count)]
    if count < 4 and rng.random() < 2 / 3:
        items.append(_thing(rng, artwork, _log_uniform(rng, 42, 66), other))
    if rng.random() < (0.7 if held_out else 0.45):
        for item in items[:count]:
            item.style = items[0].style
    scatter(rng, items, frame)
    return items


def _crowd(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int]) -> list[Item]:
    """Two or three kinds of things in rows, most fields taken."""
    fields = math.prod((side - 2 * EDGE) // _CROWD_FIELD for side in frame)
    names = [THINGS[i].name for i in rng.choice(len(THINGS), int(rng.integers(2, 4)), replace=False)]
    styles = {name: artwork.styles[int(rng.integers(len(artwork.styles)))] for name in names}
    items = [
        _thing(rng, artwork, _log_uniform(rng, 34, 60), names[int(rng.integers(len(names)))])
        for _ in range(max(2, round(fields * rng.uniform(0.6, 1.0))))
    ]
    if rng.random() < 0.5:
        for item in items:
            item.style = styles[item.name]
    set_in_rows(rng, items, frame)
    return items


def _shapes(rng: np.random.Generator, frame: tuple[int, int]) -> list[Item]:
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
        Item(name, None, colour, _log_uniform(rng, 36, largest), float(rng.uniform(-12, 12)))
        for name, colour in zip(names, colours, strict=True)
    ]
    fit(items, frame)
    scatter(rng, items, frame)
    return items


def _line(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int], *, held_out: bool) -> _Line:
    """A word set letter by letter, narrow letters given room, so that each one owns some half cell."""
    word = draw_word(rng, held_out=held_out)
    shown = word.upper() if rng.random() < 0.5 else word
    fonts = tuple(artwork.fonts)
    font = fonts[int(rng.integers(len(fonts)))]
    room = frame[0] - 2 * EDGE
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
    line.x = int(rng.integers(EDGE, frame[0] - EDGE - line.width + 1))
    line.y = int(rng.integers(EDGE, frame[1] - EDGE - line.height + 1))
    return line


def _page(rng: np.random.Generator, artwork: Artwork, frame: tuple[int, int], *, held_out: bool) -> list[_Line]:
    """Lines of one colour, far enough apart that no two share a row of cells; the first always fits."""
    lines: list[_Line] = []
    top = EDGE + int(rng.integers(0, 8))
    while True:
        line = _line(rng, artwork, frame, held_out=held_out)
        if lines and top + line.height > frame[1] - EDGE:
            return lines
        line.y = min(top, frame[1] - EDGE - line.height)
        line.colour = lines[0].colour if lines else line.colour
        lines.append(line)
        top = line.y + max(line.height + 2, CELL) + int(rng.integers(0, 5))


def _beside_word(rng: np.random.Generator, artwork: Artwork, line: _Line, frame: tuple[int, int]) -> list[Item]:
    """Two times in five a thing above or below the word; the word moves to the edge to make room."""
    if rng.random() > 0.4:
        return []
    room = min(frame[1] - line.height - 2 * GAP, frame[0]) - 2 * EDGE
    if room < _LEAST_ROOM:
        return []
    item = _thing(rng, artwork, _log_uniform(rng, 44, 90))
    item.side *= min(1.0, room / item.reach)
    item.x = float(rng.uniform(EDGE, max(EDGE, frame[0] - item.reach - EDGE)))
    slack = float(rng.uniform(0, max(0.0, room - item.reach)))
    if rng.random() < 0.5:
        line.y, item.y = EDGE + int(slack / 2), EDGE + slack / 2 + line.height + GAP
    else:
        line.y, item.y = frame[1] - line.height - EDGE - int(slack / 2), float(EDGE)
    return [item]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))


def _paint(
    rng: np.random.Generator, artwork: Artwork, items: Sequence[Item], lines: Sequence[_Line], kind: str,
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
