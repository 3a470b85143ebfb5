"""Where a scene's objects stand: inside the picture, apart from each other, as large as they can be.

In: a numpy random generator and items with their sides; out: the same items, placed, some of them smaller. It paints
nothing and knows no labels. `frame` is (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Pixels between an object and the picture's edge, and between two objects.
EDGE, GAP = 3, 4
_SPOTS, _DRAWS_IN_DISORDER = 32, 5


@dataclass(slots=True)
class Item:
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


def fit(items: Sequence[Item], frame: tuple[int, int]) -> None:
    """Shrink what is larger than the picture."""
    for item in items:
        item.side *= min(1.0, (min(frame) - 2 * EDGE) / item.reach)


def scatter(rng: np.random.Generator, items: Sequence[Item], frame: tuple[int, int]) -> None:
    """Random places without overlap. Where several draws did not work out the items stand in rows and columns, and only
    what does not fit there shrinks: small things are told apart badly, and chance alone would make many small."""
    for _ in range(_DRAWS_IN_DISORDER):
        placed: list[Item] = []
        for item in sorted(items, key=lambda one: -one.reach):
            if not _find_place(rng, item, placed, frame):
                break
            placed.append(item)
        if len(placed) == len(items):
            return
    set_in_rows(rng, items, frame)


def set_in_rows(rng: np.random.Generator, items: Sequence[Item], frame: tuple[int, int]) -> None:
    """Each item somewhere in a field of its own, of as many rows and columns as shrink them the least."""
    count, (width, height) = len(items), (side - 2 * EDGE for side in frame)
    room, rows = max((min(height / n, width / math.ceil(count / n)) - GAP, n) for n in range(1, count + 1))
    columns = math.ceil(count / rows)
    for item, field in zip(items, rng.permutation(rows * columns).tolist(), strict=False):
        item.side *= min(1.0, room / item.reach)
        slack = width / columns - GAP - item.reach, height / rows - GAP - item.reach
        x, y = (rng.uniform(0, max(0.0, free)) for free in slack)
        item.x = EDGE + field % columns * width / columns + x
        item.y = EDGE + field // columns * height / rows + y


def _find_place(rng: np.random.Generator, item: Item, placed: Sequence[Item], frame: tuple[int, int]) -> bool:
    """The first of some random places that is free."""
    reach = item.reach
    spots = EDGE + rng.random((_SPOTS, 2)) * (np.asarray(frame) - 2 * EDGE - reach)
    free = np.ones(len(spots), bool)
    for other in placed:
        at = np.array((other.x, other.y))
        free &= ((spots + reach + GAP <= at) | (at + other.reach + GAP <= spots)).any(axis=1)
    if free.any():
        item.x, item.y = spots[free.argmax()].tolist()
    return bool(free.any())
