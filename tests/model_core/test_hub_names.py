"""The published checkpoints load tensor by tensor, and those that the tests combine carry the hub's names of tensors.

transformers calls many of them otherwise in memory, and renames them on the way: parts saved under its own names would
not show that the published ones load.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Dinov2Model, Dinov2WithRegistersModel, Qwen2_5_VLForConditionalGeneration

from model_core import checkpoint
from model_core.checkpoint import combine_checkpoints, load_checkpoint, save_checkpoint
from model_core.errors import CheckpointMismatchError
from tests.model_core import public_tensors, tiny
from tests.model_core.public_tensors import Shapes
from tests.model_core.test_identity import CASES, logits
from tests.model_core.test_real_sizes import DINOV2, DINOV2_TOTAL, QWEN, QWEN_TOTAL, dinov2_config, qwen_config
from tests.model_core.tiny import save_dinov2, save_qwen

#: Of the small models here.
SMALL_QWEN = {"hidden": 64, "layers": 2, "keys": 32, "inner": 96, "vision": (32, 4, 48)}
SMALL_DINOV2 = {"hidden": 24, "layers": 2, "image": 70}


def published_qwen(size: str) -> Shapes:
    hidden, layers, heads, kv_heads, inner, vocabulary, vision_mlp, tied = QWEN[size]
    keys = kv_heads * (hidden // heads)
    return public_tensors.qwen(hidden, layers, keys, inner, vocabulary, tied=tied, vision=(1280, 32, vision_mlp))


def published_dinov2(size: str, registers: int) -> Shapes:
    hidden, layers, _ = DINOV2[size]
    return public_tensors.dinov2(hidden, layers, registers=registers, is_swiglu=size == "g")


def load(cls: Any, config: Any, published: Shapes) -> torch.nn.Module:
    """What our loader makes of a checkpoint with these tensors. None has a memory, or 72B would not fit here."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    options = {"config": config, "state_dict": tensors, "device_map": {"": "meta"}, "dtype": torch.float32}
    return checkpoint._from_pretrained(cls, None, "model", **options)


def shapes_in(file: Path) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}


def count(published: Shapes) -> int:
    return sum(math.prod(shape) for shape in published.values())


@pytest.mark.parametrize("size", QWEN)
def test_every_published_tensor_of_qwen_has_its_place_and_no_place_is_left(size: str) -> None:
    published = published_qwen(size)
    assert len(published) == {"3B": 824, "7B": 729, "72B": 1353}[size]
    assert count(published) == QWEN_TOTAL[size]
    assert ("lm_head.weight" in published) == (size != "3B")
    model = load(Qwen2_5_VLForConditionalGeneration, qwen_config(size), published)
    assert sum(p.numel() for p in model.parameters()) == QWEN_TOTAL[size]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", DINOV2)
def test_every_published_tensor_of_dinov2_has_its_place_and_no_place_is_left(size: str, registers: int) -> None:
    published = published_dinov2(size, registers)
    assert count(published) == DINOV2_TOTAL[size] + registers * DINOV2[size][0]
    cls = Dinov2WithRegistersModel if registers else Dinov2Model
    model = load(cls, dinov2_config(size, registers), published)
    assert sum(p.numel() for p in model.parameters()) == count(published)


LACKING = [
    "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.27.self_attn.k_proj.bias",
    "visual.blocks.31.mlp.up_proj.bias", "visual.merger.mlp.2.weight", "visual.merger.ln_q.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", LACKING)
def test_one_tensor_that_is_missing_is_told(name: str) -> None:
    """That the two tests above can fail."""
    published = published_qwen("7B")
    del published[name]
    with pytest.raises(CheckpointMismatchError, match="1 in all"):
        load(Qwen2_5_VLForConditionalGeneration, qwen_config("7B"), published)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.28.mlp.up_proj.weight", (18944, 3584), "has no place"),
        ("visual.blocks.0.attn.q.weight", (1280, 1280), "has no place"),
        ("model.layers.0.self_attn.k_proj.weight", (3584, 3584), "not "),
    ],
)
def test_one_tensor_too_many_or_of_another_shape_is_told(name: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=reason):
        load(Qwen2_5_VLForConditionalGeneration, qwen_config("7B"), published_qwen("7B") | {name: shape})


@pytest.mark.parametrize("tie", [True, False])
def test_the_small_qwen_used_here_has_exactly_the_hubs_tensors(tie: bool, tmp_path: Path) -> None:
    expected = public_tensors.qwen(**SMALL_QWEN, vocabulary=len(tiny.byte_tokenizer()), tied=tie)
    assert shapes_in(save_qwen(tmp_path / "q", tie=tie) / "model.safetensors") == expected


@pytest.mark.parametrize("is_swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_the_small_dinov2_used_here_has_exactly_the_hubs_tensors(
    registers: int, is_swiglu: bool, tmp_path: Path
) -> None:
    expected = public_tensors.dinov2(**SMALL_DINOV2, registers=registers, is_swiglu=is_swiglu)
    folder = save_dinov2(tmp_path / "d", registers, use_swiglu_ffn=is_swiglu)
    assert shapes_in(folder / "model.safetensors") == expected


def test_a_head_that_is_not_tied_arrives_and_stays(tmp_path: Path) -> None:
    """7B and 72B have one; a head that was tied anyway, or made anew, would answer nonsense."""
    qwen = save_qwen(tmp_path / "q", tie=False)
    saved = load_file(qwen / "model.safetensors")
    loaded = combine_checkpoints(qwen, save_dinov2(tmp_path / "d"))
    save_checkpoint(loaded.model, loaded.processor, tmp_path / "dual")
    expected = logits(tiny.qwen_model(tie=False), CASES["one image"])
    for model in (loaded.model, load_checkpoint(tmp_path / "dual").model):
        embedding = model.model.language_model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, saved["lm_head.weight"])
        assert torch.equal(embedding, saved["model.embed_tokens.weight"])
        assert not torch.equal(model.lm_head.weight, embedding)
        assert torch.equal(logits(model, CASES["one image"]), expected)


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
