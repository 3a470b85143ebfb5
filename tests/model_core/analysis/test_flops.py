"""The operations counted from the config are those that torch counts in the towers' own forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config

from model_core.analysis.flops import dinov2_flops, tower_flops
from model_core.model import DualVisionModel
from tests.model_core import tiny

GRIDS = [(1, 8, 8), (1, 6, 10), (2, 4, 8)]


def counted(model: DualVisionModel, name: str, grid: tuple[int, int, int]) -> int:
    """What torch sees, attention as plain products."""
    backbone = model.model
    backbone.encoder_module(name).set_attn_implementation("eager")
    pixels, grid_thw = tiny.pixels(grid)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        backbone.encode_images(pixels, grid_thw, [name])
    return counter.get_total_flops()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("registers", [0, 4])
def test_both_towers(grid: tuple[int, int, int], registers: int) -> None:
    model = tiny.dual_model(registers=registers)
    expected = {name: counted(model, name, grid) for name in ("qwen", "dinov2")}
    assert tower_flops(model.config, grid) == expected


def test_the_budget_is_counted() -> None:
    model = tiny.dual_model(dinov2_max_patches=16)
    assert tower_flops(model.config, (1, 8, 8))["dinov2"] == counted(model, "dinov2", (1, 8, 8))


def test_the_giant_has_a_gated_mlp() -> None:
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    plain, gated = (Dinov2Config(**shape, use_swiglu_ffn=swiglu) for swiglu in (False, True))
    tokens, extra = 65, 3 * 64 - 2 * 96  # two matrices of 96 against three of 64
    difference = dinov2_flops(gated, (1, 8, 8), 1369) - dinov2_flops(plain, (1, 8, 8), 1369)
    assert difference == 2 * 2 * tokens * 24 * extra


def test_an_encoder_of_the_users_own_is_not_counted() -> None:
    config = tiny.dual_config()
    config.encoder = "mine:Eye"
    assert set(tower_flops(config, (1, 8, 8))) == {"qwen"}
