"""One training step of a tiny dual model, by hand: for tests of the recipe that need no loop and no data."""

from __future__ import annotations

import torch
from torch import Tensor

from model_core.model import DualVisionModel
from model_core.training.losses import LabelRows, sample_losses
from model_core.vision_tokens import cell_grids
from tests.model_core import tiny

GRID = (1, 4, 4)
NUM_CELLS = 4


def untied_model(seed: int = 0) -> DualVisionModel:
    """As `tiny.trained_model`, with a head of its own."""
    torch.manual_seed(seed)
    config = tiny.DualVisionConfig.from_parts(tiny.qwen_config(tie=False), tiny.dinov2_config())
    return move_fusion(DualVisionModel(config).eval(), seed)


def move_fusion(model: DualVisionModel, seed: int = 0) -> DualVisionModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def answer_hidden(
    model: DualVisionModel, pixel_values: Tensor, answers: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images of GRID, one a sample, each before one answer token: hidden (S, D), labels (S,), gate weights (I, E)."""
    num = len(answers)
    grid = torch.tensor([GRID] * num)
    backbone = model.model
    features = backbone.encode_images(pixel_values, grid, ["qwen", "dinov2"])
    fused = backbone.fuse(features, cell_grids(grid, backbone.config.merge_size))
    ids = torch.full((num, NUM_CELLS + 2), tiny.token_id("<|vision_start|>"))
    ids[:, -1] = answers
    embeds = backbone.get_input_embeddings()(ids)
    tokens = fused.tokens.view(num, NUM_CELLS, -1).to(embeds.dtype)
    embeds = torch.cat([embeds[:, :1] * 0 + tokens[:, :1], tokens[:, 1:], embeds[:, -2:]], dim=1)
    hidden = backbone.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    labels = torch.full_like(ids, -100)
    labels[:, -1] = answers
    return hidden.flatten(0, 1), labels.flatten(), fused.weights


def answer_loss(model: DualVisionModel, pixel_values: Tensor, answers: Tensor) -> Tensor:
    hidden, labels, _ = answer_hidden(model, pixel_values, answers)
    rows = LabelRows.of(labels, [NUM_CELLS + 2] * len(answers))
    return sample_losses(hidden[rows.places], model.lm_head.weight, rows).mean()


__all__ = ["GRID", "NUM_CELLS", "answer_hidden", "answer_loss", "move_fusion", "sample_losses",
           "untied_model"]  # fmt: skip
