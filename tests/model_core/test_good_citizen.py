"""A real PreTrainedModel: PEFT, gradient checkpointing and training mode work on it as on any other."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from model_core.checkpoint import Loaded
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
