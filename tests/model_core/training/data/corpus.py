"""Small corpora on disk: pictures of known colours, rows in the README's format."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from model_core.language.rope import MropeLayout
from model_core.processing.batch import InputFormat
from tests.model_core import tiny


def tiny_format(max_pixels: int = 112 * 112) -> InputFormat:
    processor = tiny.processor(max_pixels)
    return InputFormat(processor.tokenizer, processor.special, processor.patch_spec, MropeLayout(2, 2))


def jpeg(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (80, 60)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG", quality=95)
    return file.getvalue()


def row(image: str | None, question: str | None = "What is it?", answer: str = "A car.") -> dict[str, Any]:
    turns = [{"role": "user", "content": question}] if question is not None else []
    return ({"image_path": image} if image else {}) | {
        "conversations": [*turns, {"role": "assistant", "content": answer}]
    }


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """JSON lines where the name says so, else an array."""
    lines = [json.dumps(one) for one in rows]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]")
    return path


def write_corpus(folder: Path, count: int = 10, name: str = "data.json") -> Path:
    """`count` rows, each with its own picture, question and length."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(jpeg((7 * i % 256, 100, 255 - i), (56 + 4 * (i % 5), 60)))
    return write_rows(
        folder / name, [row(f"{i}.jpg", f"Question {i}?", "Word " * (1 + i % 7) + str(i)) for i in range(count)]
    )
