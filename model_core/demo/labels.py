"""What each 28-pixel cell of a scene shows, as the dense losses of the demo's build ask for it.

In: objects with their painted patches, letters with their places. Out: grids of numbers. An object takes the
cells it covers; "places" and "counts" are told of every cell of an object, so that whoever reads any one of
its cells knows where its middle is and how many of its kind there are. Shares lie about an object's middle, each cell
the more the nearer its own: they sum to one wherever the middle falls, and no outline has to be known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

CELL = 28
MAX_COUNT = 5
MAX_SPOT = 6
#: A cell of which less is painted shows nothing that could be told.
_LEAST_COVER = 0.04


class CellLabels:
    """Grids of (gh, gw): object (1-based index, 0 none), class and colour (0 none); of (gh, gw, 2), for the left
    and right half of a cell: letter (1..26) and spot (which letter of its word, from 1), 0 for none.

    `shares` tells which class paints the most of a cell and how much of its objects is counted there."""

    def __init__(self, height: int, width: int) -> None:
        grid = (height // CELL, width // CELL)
        self.object, self.class_, self.colour = (np.zeros(grid, np.int16) for _ in range(3))
        self.letters, self.spots = (np.zeros((*grid, 2), np.int16) for _ in range(2))
        self._best = np.full(grid, 0.25)
        self._painted: list[tuple[int, np.ndarray, np.ndarray]] = []  # class, cover, shares

    def add_object(
        self, number: int, box: tuple[int, int, int, int], patch: np.ndarray, class_: int, colour: int
    ) -> None:
        """A cell belongs to the object that covers most of it (a quarter at least) or whose middle it holds."""
        x, y = box[:2]
        left, top = x % CELL, y % CELL
        rows, columns = -(-(top + patch.shape[0]) // CELL), -(-(left + patch.shape[1]) // CELL)
        mask = np.zeros((rows * CELL, columns * CELL), bool)
        mask[top : top + patch.shape[0], left : left + patch.shape[1]] = patch[:, :, 3] > 127
        cover = mask.reshape(rows, CELL, columns, CELL).mean(axis=(1, 3))
        middle_x, middle_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        window = np.s_[y // CELL : y // CELL + rows, x // CELL : x // CELL + columns]
        painted = np.zeros_like(self._best)
        painted[window] = cover
        self._painted.append((class_, painted, self._about(middle_x, middle_y)))
        cover[int(middle_y) // CELL - y // CELL, int(middle_x) // CELL - x // CELL] += 1.0
        won = cover >= self._best[window]
        self._best[window][won] = cover[won]
        for grid, value in ((self.object, number), (self.class_, class_), (self.colour, colour)):
            grid[window][won] = value

    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """int16 and float32 (gh, gw): the class that paints most of a cell, 0 for none, and how much of that class's
        objects is counted there: over a picture's cells of a class they sum to how many of it there are."""
        kind, shares = np.zeros_like(self.class_), np.zeros(self.class_.shape, np.float32)
        best = np.full(kind.shape, _LEAST_COVER)
        for class_ in dict.fromkeys(class_ for class_, *_ in self._painted):
            cover = sum(cover for name, cover, _ in self._painted if name == class_)
            kind[cover > best] = class_
            best = np.maximum(best, cover)
        for class_, cover, about in self._painted:
            # Its middle may lie in another's cells; then what it paints elsewhere counts.
            for seen in (np.where(kind == class_, about, 0.0), np.where(kind == class_, cover, 0.0)):
                if seen.any():
                    shares += (seen / seen.sum()).astype(np.float32)
                    break
        return kind, shares

    def _about(self, x: float, y: float) -> np.ndarray:
        """(gh, gw), summing to 1 inside the picture: what a square as large as a cell about (x, y) has of each cell."""
        down, across = (
            np.clip(1 - np.abs(at - (np.arange(count) + 0.5) * CELL) / CELL, 0, None)
            for at, count in zip((y, x), self.object.shape, strict=True)
        )
        return down[:, None] * across

    def add_word(self, baseline: int, band: float, letters: Sequence[tuple[str, int, int]]) -> None:
        """letters: (letter, x0, x1). All lie in the rows of cells that hold half of `band`, the letters' height."""
        centres = np.arange(self.letters.shape[1] * 2) * (CELL // 2) + CELL // 4
        edges = np.arange(self.letters.shape[0]) * CELL
        overlap = np.minimum(edges + CELL, baseline) - np.maximum(edges, baseline - band)
        rows = overlap >= 0.5 * min(CELL, band)
        flat, spots = (grid.reshape(grid.shape[0], -1) for grid in (self.letters, self.spots))
        for spot, (letter, x0, x1) in enumerate(letters, start=1):
            columns = (centres >= x0) & (centres < x1)
            flat[np.ix_(rows, columns)] = ord(letter.lower()) - 96
            spots[np.ix_(rows, columns)] = min(spot, MAX_SPOT)


def cell_places(scene: Any) -> np.ndarray:
    """float32 (gh, gw, 2): the middle (x, y) of the cell's object, of the cell itself where there is none,
    as shares of the picture's width and height, from -1 to 1."""
    rows, columns = scene.cell_object.shape
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    places = np.stack([x, y], axis=-1).astype(np.float32)
    for number, one in enumerate(scene.objects, start=1):
        places[scene.cell_object == number] = (one.centre[0] / scene.size[1], one.centre[1] / scene.size[0])
    return 2 * places - 1


def cell_counts(scene: Any) -> np.ndarray:
    """int16 (gh, gw, 2): in an object's cells how many objects of its name, and how many in all; else 0."""
    counts = np.zeros((*scene.cell_object.shape, 2), np.int16)
    by_name = Counter(one.name for one in scene.objects)
    for number, one in enumerate(scene.objects, start=1):
        counts[scene.cell_object == number] = np.minimum((by_name[one.name], len(scene.objects)), MAX_COUNT)
    return counts
