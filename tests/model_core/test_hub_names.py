"""The checkpoints that the tests combine carry the hub's names of tensors, and mean by them what the hub's mean.

transformers calls many of them otherwise in memory, and renames them on the way: parts saved under its own names would
not show that the published ones load.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model_core.checkpoint import combine_checkpoints
from tests.model_core import tiny
from tests.model_core.tiny import save_dinov2, save_qwen

QWEN = {
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight",
    "visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight",
}  # fmt: skip
DINOV2 = {
    "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight",
    "encoder.layer.0.attention.attention.query.weight", "encoder.layer.0.attention.output.dense.weight",
    "encoder.layer.0.layer_scale1.lambda1", "layernorm.weight",
}  # fmt: skip
SWIGLU = {f"encoder.layer.0.mlp.weights_{way}.{kind}" for way in ("in", "out") for kind in ("weight", "bias")}


def test_the_parts_used_here_name_their_tensors_as_the_hub_does(tmp_path: Path) -> None:
    for folder, expected in (
        (save_qwen(tmp_path / "q"), QWEN),
        (save_dinov2(tmp_path / "d"), DINOV2 | {"encoder.layer.0.mlp.fc1.weight"}),
        (save_dinov2(tmp_path / "g", 4, use_swiglu_ffn=True), DINOV2 | SWIGLU | {"embeddings.register_tokens"}),
    ):
        names = set(load_file(folder / "model.safetensors"))
        assert expected <= names
        assert not any(name.startswith(("model.language_model.", "model.visual.")) for name in names)


def test_qwens_tensors_are_the_files_own(tmp_path: Path) -> None:
    model = combine_checkpoints(save_qwen(tmp_path / "q"), save_dinov2(tmp_path / "d")).model
    saved = load_file(tmp_path / "q/model.safetensors")
    assert torch.equal(
        model.model.language_model.layers[1].mlp.up_proj.weight, saved["model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(model.model.visual.blocks[2].attn.qkv.weight, saved["visual.blocks.2.attn.qkv.weight"])


@pytest.mark.parametrize("registers", [0, 4])
def test_a_second_encoder_with_swiglu_computes_what_its_file_means(registers: int, tmp_path: Path) -> None:
    """DINOv2 giant's feed-forward: gate and value are one matrix in the file, in this order."""
    second = save_dinov2(tmp_path / "g", registers, use_swiglu_ffn=True)
    model = combine_checkpoints(save_qwen(tmp_path / "q"), second).model
    saved = {
        name.removeprefix("encoder.layer.1.mlp."): x for name, x in load_file(second / "model.safetensors").items()
    }
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    gate, value = F.linear(x, saved["weights_in.weight"], saved["weights_in.bias"]).chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * value, saved["weights_out.weight"], saved["weights_out.bias"])
    with torch.no_grad():
        assert torch.allclose(model.model.dinov2.encoder.layer[1].mlp(x), expected, atol=1e-6)
        model.fusion.projectors["dinov2"].weight.normal_()
        tokens = model.embed_images(*tiny.pixels((1, 4, 6))).tokens
    assert tokens.shape == (6, 64)
    assert not torch.equal(tokens, tiny.dual_model().embed_images(*tiny.pixels((1, 4, 6))).tokens), "it is read"
