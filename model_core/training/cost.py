"""What a run costs: floating-point operations of a pack by what trains, and the memory of weights and optimizer.

In: a model's configuration, a freeze table, the shapes of a pack; out: operations and bytes. Operations are of matrix
products, a multiplication and an addition being two; recomputation under gradient checkpointing is not counted, so a
share of the peak made of them is model FLOP utilisation (2204.02311, appendix B). Activations are not estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from model_core.training.freeze import FreezeTable
from model_core.vision_tokens import Grid

#: Forward operations of each vision tower for one picture, by encoder name, from the configuration and its patch grid.
TowerFlops = Callable[[Any, Grid], Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class PackShape:
    """What a pack's cost depends on. grids: patches (t, h, w) of each image."""

    sample_lengths: tuple[int, ...]
    num_label_tokens: int
    grids: tuple[Grid, ...]


def passes(table: FreezeTable) -> dict[str, int]:
    """How many times a component's forward operations are done in a step: by name, 1 to 3.

    Once forward; once more where a gradient goes through it to something trained, itself or before it; once more for
    its own weights' gradient. A frozen weight has none, and adapters' own products are small beside their layer's.
    """
    trained = table.trainable_components
    whole = {row.component for row in table.rows if row.trainable and row.state != "LORA"}
    before = {
        "qwen": {"qwen_vision", "merger"},
        "dinov2": {"dinov2"},
        "fusion": {"qwen_vision", "merger", "dinov2", "projections", "gate", "output_projector"},
    }
    found = {name: 1 + bool(trained & own) + bool(whole & own) for name, own in before.items() if name != "fusion"}
    fusion = {"projections", "gate", "output_projector"}
    found["fusion"] = 1 + bool(trained & before["fusion"]) + bool(whole & fusion)
    found["llm"] = 1 + bool(trained) + ("llm" in whole)
    return found


def forward_flops(config: Any, shape: PackShape, tower_flops: TowerFlops) -> dict[str, int]:
    """Operations of one forward pass over a pack, by part: each tower, fusion, the language model.

    Of the architecture, as MFU is counted (PaLM, 2204.02311, appendix B): that the last layer is not computed to
    its end where no label reads it (`keep` of `decode_layer`) is left out.
    """
    found = {"qwen": 0, "dinov2": 0}
    for grid in shape.grids:
        for name, flops in tower_flops(config, grid).items():
            found[name] = found.get(name, 0) + flops
    merge = config.merge_size**2
    cells = sum(t * h * w // merge for t, h, w in shape.grids)
    width, common = config.llm_dim, config.fusion_dim
    second = getattr(config.dinov2_config, "hidden_size", 0) * merge
    found["fusion"] = 2 * cells * common * (width + second + width)
    text = config.text_config
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    head_dim = text.hidden_size // text.num_attention_heads
    layer = text.hidden_size * head_dim * heads + text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    pairs = sum(n * (n + 1) // 2 for n in shape.sample_lengths)
    found["llm"] = (
        2 * sum(shape.sample_lengths) * text.num_hidden_layers * layer
        + 4 * pairs * text.hidden_size * text.num_hidden_layers
        + 2 * shape.num_label_tokens * text.hidden_size * text.vocab_size  # rows without a label have no logits
    )
    return found


def train_flops(config: Any, table: FreezeTable, shape: PackShape, tower_flops: TowerFlops) -> int:
    """Operations that one pack owes, forward and backward, under this freeze table."""
    times = passes(table)
    forward = forward_flops(config, shape, tower_flops)
    return sum(flops * times.get(name, times["dinov2"]) for name, flops in forward.items())


def utilisation(flops: float, seconds: float, peak_flops_per_second: float) -> float:
    """The share of the machine's peak that was reached: MFU."""
    return flops / (seconds * peak_flops_per_second)


def state_bytes(table: FreezeTable, *, weight_bytes: int) -> dict[str, int]:
    """Bytes on the device before any activation.

    weight_bytes: of a stored weight, 2 or 4. A trained weight has two float32 moments and a float32 gradient, and
    in 16 bits a float32 master and its own short-lived gradient as well.
    """
    total = sum(row.total for row in table.rows)
    trained = table.num_trainable
    is_short = weight_bytes < 4
    return {
        "weights": total * weight_bytes,
        "gradients": trained * (4 + (weight_bytes if is_short else 0)),
        "moments": trained * 8,
        "masters": trained * 4 if is_short else 0,
    }
