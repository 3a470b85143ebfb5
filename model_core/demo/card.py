"""The model card of `dve-demo`: what it is, how it was made, what it scored, and that it knows nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from model_core.demo.artwork import STYLES
from model_core.demo.build import num_steps
from model_core.demo.scenes import COLOUR_NAMES, SHAPES
from model_core.demo.scoring import Scores, render_table
from model_core.demo.things import THINGS
from model_core.training.config import Stage, TrainConfig
from model_core.training.freeze import trained_components

TARGETS = {"name": 0.90, "colour": 0.97, "count": 0.95, "position": 0.95, "presence": 0.95, "read": 0.85}


def write_card(
    config: TrainConfig,
    arms: Mapping[str, Scores],
    scaled: Scores,
    *,
    sides: tuple[int, int],
    parameters: int,
    history: str,
) -> str:
    """Markdown with YAML front matter, as hubs read it. scaled: the fused model's, on pictures that it scales.

    sides: the shortest and the longest, in pixels, of the pictures that it does not."""
    return _CARD.format(
        parameters=f"{parameters / 1e6:.1f}",
        history=history,
        batch=config.batch_size,
        num_things=len(THINGS),
        things=", ".join(thing.name for thing in THINGS),
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOUR_NAMES),
        styles=" and ".join(STYLES),
        stages="\n".join(_stage_row(stage, config) for stage in config.stages()),
        table=render_table(arms, markdown=True),
        verdicts=_verdicts(arms["fused"]),
        sides=sides,
        scaled=f"{100 * scaled.total.share:.1f}",
        scaled_count=f"{scaled.total.count:,}",
        scaled_read=f"{100 * scaled.by_kind['read'].share:.1f}",
        scaled_number=f"{100 * scaled.by_kind['count'].share:.1f}",
    )


def _stage_row(stage: Stage, config: TrainConfig) -> str:
    weights = {"language": 1.0, **stage.loss_weights}
    losses = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    trains = ", ".join(sorted(trained_components(stage.freeze)))
    return f"| {stage.description} | {trains} | {num_steps(stage, config)} | {stage.learning_rate:g} | {losses} |"


def _verdicts(fused: Scores) -> str:
    """Each target with what was reached, met or not."""
    lines = []
    for kind, target in TARGETS.items():
        share = fused.by_kind[kind].share
        word = "met" if share >= target else "NOT met"
        lines.append(f"- {kind}: target {100 * target:.0f} %, reached {100 * share:.1f} %: {word}")
    return "\n".join(lines)


_CARD = """---
license: apache-2.0
library_name: dual-vision-encoder
pipeline_tag: image-text-to-text
---
# dve-demo

A {parameters} M parameter model of the same two architectures as the real thing (Qwen2.5-VL's and
DINOv2's, `gated` fusion), trained from scratch by this project on generated pictures, so that
everything can be seen working without a hub and without a GPU.

**It knows nothing else** than what it was trained on: {num_things} things drawn in two emoji styles, plain coloured
shapes, counting to four, left/right/above/below of two objects, and short words. How well it does each of them
stands under Scores; where a target is not met, don't rely on it. Photographs, other things,
longer texts and conversation are beyond it: it will answer, and the answer will be wrong.

## What it can be asked

What is it, what colour, how many, where (left, right, above, below), is there a ...?, what does it say?,
describe the picture; in free phrasings, with or without a capital at the beginning.

Things: {things}.

Shapes: {shapes}. Colours: {colours}.

## Scores

On generated pictures whose seeds no training picture shares; `dve demo eval` prints this table again.
The artwork is the training artwork: scores tell of new scenes, not of new drawings. Wilson 95 % intervals.
The pictures have {sides[0]} to {sides[1]} pixels a side and are not scaled. Larger and smaller ones are, which no
training picture was: of {scaled_count} questions about such with 196 to 280 pixels a side it answered {scaled} % right,
read {scaled_read} % of the words and counted {scaled_number} %.

{table}

`chance` is what guessing scores. Removing an encoder means replacing its features by their mean before
the gate; `unfused` is Qwen's own tokens, for which this language model was never trained.

{verdicts}

## How it was made

{history}

Weights are stored in bfloat16 and computed in float32. The recipe, steps of {batch} pictures:

| stage | trains | steps | learning rate | losses and their weights |
|---|---|---|---|---|
{stages}

The loss on cells asks each encoder, cell by cell, which thing and colour is there and where the object's middle is;
Qwen's tower also which letter, and which of its word; DINOv2 how many such objects there are. So one eye reads and the
other counts, as one was taught to read in life and the other was not. In the answering stages a fused token is drawn
towards the words for what it shows; one attention head of the first layer is taught to look from a noun to its cells,
another to look as much at each thing as at the first token, so that a number may be read from it, and one of the third
layer to look for a word's next letter where it stands. `language` is the loss
on the answers' words; a loss that a stage does not name counts once. Optimizer: Muon for the matrices inside blocks,
AdamW for the rest; bfloat16 products where the machine is fast at them. The gate learns at a twentieth of the rate and
has a marginal KL loss.

Data: scenes composed from emoji artwork ({styles}) on varied backgrounds, plain shapes, and words in
several fonts; every question is generated from the scene. See NOTICE for the artwork's licences.
"""
