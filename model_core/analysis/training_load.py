"""What `dve bench train` trains on: questions about pictures, short answers and long ones mixed as in real data.

In: numbers; out: a folder with a JSON file in the README's format and JPEGs beside it. The same numbers give the same
bytes. No torch, no clock, no model.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from model_core.analysis.workload import draw_picture

_CELL = 28
_WORDS = (
    "the", "object", "in", "this", "image", "is", "a", "small", "value", "with", "some", "lines", "and", "more",
    "than", "one", "name", "at", "the", "left", "side", "of", "it", "where", "all", "others", "are", "not", "set",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainingLoad:
    """Sizes of a data set.

    image_size: smallest and largest side in pixels; sides are drawn on a logarithmic scale, each by itself.
    words: shortest and longest answer, drawn likewise: half of all answers are below their geometric mean, and every
        batch has one that is several times its median, as instruction data of captions and short answers has.
    """

    num_samples: int = 32
    image_size: tuple[int, int] = (56, 224)
    words: tuple[int, int] = (1, 160)
    seed: int = 0

    def write(self, folder: Path) -> Path:
        """Draw all of it below `folder`. Returns the JSON file."""
        rng = random.Random(self.seed)
        rows = []
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for number in range(self.num_samples):
            name = f"images/{number}.jpg"
            side = max(_CELL * 2, round(_log_uniform(rng, *self.image_size) / _CELL) * _CELL)
            (folder / name).write_bytes(draw_picture(self.seed * 10**6 + number, side))
            answer = " ".join(rng.choice(_WORDS) for _ in range(round(_log_uniform(rng, *self.words))))
            turns = [
                {"role": "user", "content": f"Question {number}: what do you see in this picture?"},
                {"role": "assistant", "content": answer},
            ]
            rows.append({"image_path": name, "conversations": turns})
        path = folder / "train.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))
