"""The published sizes, built on the meta device: shapes, parameter counts, and transformers' state-dict keys."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from model_core.checkpoint import assemble
from model_core.config import DualVisionConfig
from model_core.model import DualVisionModel

# hidden, layers, heads, key-value heads, MLP, vocabulary, vision MLP, tied: as in the published config.json files.
QWEN = {
    "3B": (2048, 36, 16, 2, 11008, 151936, 3420, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, 3420, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, 3456, False),
}
QWEN_TOTAL = {"3B": 3_754_622_976, "7B": 8_292_166_656, "72B": 73_410_777_344}
DINOV2 = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "g": (1536, 40, 24)}  # hidden, layers, heads
DINOV2_TOTAL = {"S": 22_056_576, "B": 86_580_480, "L": 304_368_640, "g": 1_136_480_768}
REGISTERS = [0, 4]


def qwen_config(size: str) -> Qwen2_5_VLConfig:
    hidden, layers, heads, kv_heads, mlp, vocab, vision_mlp, tied = QWEN[size]
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab,
            "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": vision_mlp,
            "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
        },
        tie_word_embeddings=tied,
    )  # fmt: skip


def dinov2_config(size: str, registers: int) -> PreTrainedConfig:
    hidden, layers, heads = DINOV2[size]
    shape = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": 518,
        "patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": size == "g",
    }  # fmt: skip
    return Dinov2WithRegistersConfig(num_register_tokens=registers, **shape) if registers else Dinov2Config(**shape)


@functools.cache
def qwen(size: str) -> Qwen2_5_VLForConditionalGeneration:
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(qwen_config(size))


@functools.cache
def dinov2(size: str, registers: int) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(dinov2_config(size, registers))


def dual(size: str, second: str, registers: int, fusion: str = "gated") -> DualVisionModel:
    config = DualVisionConfig.from_parts(qwen_config(size), dinov2_config(second, registers), fusion=fusion)
    with torch.device("meta"):
        return DualVisionModel(config)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def shapes(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Size]:
    return {f"{prefix}{key}": tensor.shape for key, tensor in module.state_dict().items()}


def gated_parameters(llm: int, second: int) -> int:
    """LN(x), two projectors, the gate, the output projector; counted by hand."""
    gate = (2 * llm * 512 + 512) + (512 * 2 + 2)
    return 2 * second + (llm * llm + llm) + (second * llm + llm) + gate + (llm * llm + llm)


def test_the_published_sizes_have_their_published_totals() -> None:
    assert {size: count(qwen(size)) for size in QWEN} == QWEN_TOTAL
    assert {size: count(dinov2(size, 0)) for size in DINOV2} == DINOV2_TOTAL
    for size, (hidden, _, _) in DINOV2.items():
        assert count(dinov2(size, 4)) == DINOV2_TOTAL[size] + 4 * hidden


@pytest.mark.parametrize("registers", REGISTERS)
@pytest.mark.parametrize("second", DINOV2)
@pytest.mark.parametrize("size", QWEN)
def test_every_pair_builds_with_the_right_shapes_and_every_key_of_its_parts(
    size: str, second: str, registers: int
) -> None:
    model = dual(size, second, registers)
    llm, width = QWEN[size][0], 4 * DINOV2[second][0]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert count(model.fusion) == gated_parameters(llm, width)
    assert count(model) == count(qwen(size)) + count(dinov2(second, registers)) + count(model.fusion)
    fusion = model.fusion
    assert fusion.projectors["qwen"].weight.shape == fusion.output_projector.weight.shape == (llm, llm)
    assert fusion.projectors["dinov2"].weight.shape == (llm, width)
    assert fusion.means.dinov2.shape == (width,)
    assert model.model.encoders["dinov2"].num_prefix_tokens == 1 + registers
    own = shapes(model)
    # In memory; that the hub's own names load as these is in test_hub_names.py.
    public = shapes(qwen(size)) | shapes(dinov2(second, registers), "model.dinov2.")
    assert {k: v for k, v in own.items() if not k.startswith("model.fusion.")} == public


@pytest.mark.parametrize(
    "fusion", ["gated_residual", "token_gated", "concat", "cross_attention", "interleave", "static"]
)
def test_every_strategy_builds_at_7b_and_base(fusion: str) -> None:
    model = dual("7B", "B", 4, fusion)
    added = count(model) - QWEN_TOTAL["7B"] - count(dinov2("B", 4))
    assert 0 < added == count(model.fusion) < 60_000_000


@pytest.mark.parametrize(("size", "second", "registers"), [("3B", "S", 0), ("7B", "B", 4), ("72B", "g", 4)])
def test_assembling_moves_no_weight(size: str, second: str, registers: int) -> None:
    config = DualVisionConfig.from_parts(qwen_config(size), dinov2_config(second, registers))
    with torch.device("meta"):  # parts of its own: assembling takes them over
        left = Qwen2_5_VLForConditionalGeneration(qwen_config(size))
        right = AutoModel.from_config(dinov2_config(second, registers))
    theirs = {id(p) for part in (left, right) for p in part.parameters()}
    model = assemble(config, left, right)
    own = {id(p) for name, p in model.named_parameters() if not name.startswith("model.fusion.")}
    assert own == theirs, "the same tensors, not copies"
    assert shapes(model) == shapes(dual(size, second, registers))
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert tied == QWEN[size][-1]
