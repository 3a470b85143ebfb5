"""A real PreTrainedModel: PEFT, gradient checkpointing, device maps and FSDP work on it as on any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from model_core.checkpoint import Loaded, save_checkpoint
from model_core.encoder import DualVisionEncoder
from tests.model_core import tiny
from tests.model_core.test_identity import CASES, logits

INPUTS = CASES["two images of different shapes"]


def loss(model: torch.nn.Module) -> Tensor:
    return model(**INPUTS, labels=INPUTS["input_ids"]).loss


# peft 0.21.2 still asks transformers for the attribute by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_trains_its_own_weights_and_the_engine_uses_them() -> None:
    base = tiny.trained_model()
    expected = logits(base, INPUTS)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True))
    assert torch.allclose(logits(base, INPUTS), expected, atol=1e-6), "LoRA is an identity at birth too"
    loss(wrapped).backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)

    encoder = DualVisionEncoder.from_loaded(Loaded(base, tiny.processor()), "lora")
    question = [{"role": "user", "content": "hello"}]
    before = encoder.chat(question, max_tokens=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert encoder.chat(question, max_tokens=8) != before


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for is_checkpointed in (False, True):
        model = tiny.trained_model().train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        loss(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


@pytest.mark.parametrize("part", ["model.visual.", "model.dinov2.", "model.fusion.", "model.language_model."])
def test_training_reaches_every_part(part: str) -> None:
    """Fault of earlier attempts: DINOv2 always under `no_grad`."""
    model = tiny.trained_model().train()
    loss(model).backward()
    grads = [p.grad for name, p in model.named_parameters() if name.startswith(part) and p.grad is not None]
    assert any(bool(g.abs().sum() > 0) for g in grads)


#: Every second block of every part on the disk, and the whole fusion.
_DISK = ("model.visual.blocks.1", "model.visual.blocks.3", "model.dinov2.encoder.layer.1", "model.fusion",
         "model.language_model.layers.1")  # fmt: skip
_MEMORY = ("model.visual.patch_embed", "model.visual.blocks.0", "model.visual.blocks.2", "model.visual.merger",
           "model.dinov2.embeddings", "model.dinov2.encoder.layer.0", "model.dinov2.layernorm",
           "model.language_model.embed_tokens", "model.language_model.layers.0", "model.language_model.norm",
           "lm_head")  # fmt: skip
MAPS = {
    "one device": {"": "cpu"},
    "whatever suits": "auto",
    "blocks on the disk": dict.fromkeys(_DISK, "disk") | dict.fromkeys(_MEMORY, "cpu"),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("name", MAPS)
def test_a_device_map_changes_no_logit(name: str, tmp_path: Path) -> None:
    plain = tiny.trained_model()
    save_checkpoint(plain, tiny.processor(), tmp_path / "dual")
    options: dict[str, Any] = {"device_map": MAPS[name]}
    if name == "blocks on the disk":
        options["offload_folder"] = tmp_path / "offloaded"
    model = AutoModel.from_pretrained(tmp_path / "dual", **options).eval()
    assert torch.equal(logits(model, INPUTS), logits(plain, INPUTS))
    assert torch.equal(model.generate(**INPUTS, **GREEDY), plain.generate(**INPUTS, **GREEDY))
    on_disk = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert bool(on_disk) == (name == "blocks on the disk"), "nothing was kept elsewhere, so nothing is proved"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def test_fully_sharded_it_computes_and_learns_the_same(mesh: DeviceMesh) -> None:
    """Block by block, by the names that `_no_split_modules` gives, the rest as the root."""
    plain, model = tiny.trained_model().train(), tiny.trained_model().train()
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(blocks) == 4 + 2 + 1 + 2, "of the tower, of DINOv2 with its embeddings, of the language model"
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    # Before any forward, which leaves the root's parameters whole.
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model)]
    assert torch.equal(logits(model, INPUTS), logits(plain, INPUTS))
    for each, optimizer in zip((plain, model), optimizers, strict=True):
        before = logits(each, INPUTS)
        loss(each).backward()
        optimizer.step()
        assert not torch.allclose(logits(each, INPUTS), before, atol=1e-3), "a step that changes nothing proves nothing"
    assert torch.allclose(logits(model, INPUTS), logits(plain, INPUTS), atol=1e-5)
    for name in ("model.fusion.projectors.dinov2.weight", "model.dinov2.encoder.layer.0.mlp.fc1.weight"):
        moved = model.get_parameter(name)
        moved = moved.full_tensor() if isinstance(moved, DTensor) else moved
        assert torch.allclose(moved, plain.get_parameter(name), atol=1e-6)
