"""The load that every benchmark puts on a model: a question about one picture a request, both made from a number.

In: a seed and an index. Out: a question and the bytes of a JPEG. The same numbers give the same bytes. No torch, no
clock, no model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from PIL import Image, ImageDraw

Kind = Literal["distinct", "same", "text"]

_NUM_SHAPES = 12
_QUALITY = 90
#: Pictures of one seed; two seeds share none.
_PICTURES_A_SEED = 10**6


@dataclass(frozen=True, slots=True)
class Workload:
    """What one round sends.

    num_requests: in a round. num_tokens: of every answer. image_size: side of the square picture in pixels.
    kind: `distinct` pictures, the `same` picture in every request, or `text` alone.
    seed: another seed draws other pictures, so that no cache of an earlier run knows them.
    """

    num_requests: int = 48
    num_tokens: int = 64
    image_size: int = 224
    kind: Kind = "distinct"
    seed: int = 0

    def question(self, index: int) -> str:
        return f"Question {index}: what do you see in this picture? "

    def picture(self, index: int) -> bytes | None:
        """The JPEG that goes with a question; None where the load is text alone."""
        if self.kind == "text":
            return None
        number = 0 if self.kind == "same" else index
        return draw_picture(self.seed * _PICTURES_A_SEED + number, self.image_size)

    def items(self, first: int, count: int) -> list[tuple[str, bytes | None]]:
        """Questions and pictures of the requests [first, first + count)."""
        return [(self.question(index), self.picture(index)) for index in range(first, first + count)]


def draw_picture(seed: int, size: int) -> bytes:
    """A JPEG of coloured discs on a coloured ground, `size` pixels a side."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), _colour(rng))
    canvas = ImageDraw.Draw(image)
    for _ in range(_NUM_SHAPES):
        left, top = rng.randrange(size), rng.randrange(size)
        width = rng.randint(min(8, size), max(8, size // 2))
        canvas.ellipse((left, top, left + width, top + width), fill=_colour(rng))
    file = BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
