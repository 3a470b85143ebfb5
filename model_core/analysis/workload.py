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
class SamplingLoad:
    """How every request's tokens are chosen: OpenAI's fields, and those that its imitators share. Greedy by default.

    seed: request n is sampled with `seed + n`; None sends no seed, since a server may be slower with one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def fields(self, index: int) -> dict[str, float | int]:
        """Of request `index`. All that matter are named: a server may have defaults of its own from its model."""
        if self.temperature == 0.0:
            return {"temperature": 0}
        found: dict[str, float | int] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return found if self.seed is None else found | {"seed": self.seed + index}


GREEDY = SamplingLoad()


@dataclass(frozen=True, slots=True)
class Workload:
    """What one round sends.

    num_requests: in a round. num_tokens: of every answer. image_size: side of the square picture in pixels.
    kind: `distinct` pictures, the `same` picture in every request, or `text` alone.
    seed: another seed draws other pictures, so that no cache of an earlier run knows them.
    sampling: how tokens are chosen.
    """

    num_requests: int = 48
    num_tokens: int = 64
    image_size: int = 224
    kind: Kind = "distinct"
    seed: int = 0
    sampling: SamplingLoad = GREEDY

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
