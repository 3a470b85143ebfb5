"""Makes the example pictures, their questions, and the figure of an answer with its fusion weights.

    python examples/make.py [--figure-only]

The pictures are held-out scenes: no training picture shares their seed. Needs npm, as the demo's build does.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from model_core import DualVisionEncoder
from model_core.demo.artwork import Artwork, load_artwork
from model_core.demo.questions import ask
from model_core.demo.scenes import HELD_OUT_FIRST_SEED, Scene, make_scene

HERE = Path(__file__).parent
SIZE = (168, 168)
FIRST_SEED = HELD_OUT_FIRST_SEED + 10_000_000  # behind those that `dve demo eval` asks
WANTED: dict[str, tuple[str, Callable[[Scene], bool]]] = {
    "dog": ("single", lambda s: s.objects[0].name == "dog"),
    "pair": ("pair", lambda s: "cat" in {o.name for o in s.objects}),
    "group": ("group", lambda s: len(s.objects) == 3 and len({o.name for o in s.objects}) == 1),
    "shapes": ("shapes", lambda s: len(s.objects) == 2),
    "word": ("word", lambda s: s.word is not None and len(s.word) == 4),
}
FIGURE = ("dog", "what is this?")
INK, PAPER, BLUE, ORANGE, GREY = (32, 33, 36), (255, 255, 255), (66, 103, 178), (230, 126, 34), (120, 124, 130)


def make_pictures(artwork: Artwork) -> None:
    questions = []
    for name, (kind, fits) in WANTED.items():
        seed = FIRST_SEED
        while not fits(scene := make_scene(seed, artwork, SIZE, kind)):
            seed += 1
        scene.picture().save(HERE / f"{name}.png", optimize=True)
        turns = {turn.kind: turn for turn in ask(scene, random.Random(seed), limit=8)}
        questions += [
            {"image": f"{name}.png", "kind": turn.kind, "question": turn.question, "answer": turn.answer}
            for turn in turns.values()
        ]
    (HERE / "questions.json").write_text(json.dumps(questions, indent=1) + "\n")


def make_figure() -> None:
    """The picture, what was asked, what came back, and how the gate routed it."""
    model = DualVisionEncoder()
    name, question = FIGURE
    path = HERE / f"{name}.png"
    content = [{"type": "image", "image": path}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    answer, weights = model.chat(messages), model.analyze_fusion_weights(messages)
    figure = Image.new("RGB", (860, 320), PAPER)
    figure.paste(Image.open(path).resize((272, 272)), (24, 24))
    draw = ImageDraw.Draw(figure)

    def write(y: int, text: str, size: int = 20, colour: tuple[int, int, int] = INK) -> None:
        draw.text((324, y), text, font=ImageFont.load_default(size), fill=colour)

    write(24, "asked", 14, GREY)
    write(44, question)
    write(84, "answered", 14, GREY)
    write(104, answer)
    write(150, "routed by the gate (not a measure of importance)", 14, GREY)
    for row, (encoder, colour) in enumerate((("qwen", BLUE), ("dinov2", ORANGE))):
        weight, y = weights[f"{encoder}_weight"], 176 + 44 * row
        write(y, encoder, 18)
        draw.rectangle((410, y, 410 + 340, y + 26), outline=GREY)
        draw.rectangle((410, y, 410 + round(340 * weight), y + 26), fill=colour)
        draw.text((762, y + 2), f"{weight:.3f}", font=ImageFont.load_default(18), fill=INK)
    share = weights["images"][0]["contribution"]
    shown = "  ".join(f"{encoder} {value:.2f}" for encoder, value in share.items())
    write(274, f"contribution to the fused tokens: {shown}", 14, GREY)
    figure.save(HERE / "answer.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure-only", action="store_true", help="keep the pictures, ask the model anew")
    if not parser.parse_args().figure_only:
        make_pictures(load_artwork())
    make_figure()


if __name__ == "__main__":
    main()
