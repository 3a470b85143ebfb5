"""Joined layers give what the modules give, stand for the model's own parameters, and notice when they don't."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from model_core.language import fused
from model_core.language.decoder import Decoder
from model_core.language.kv_cache import RowStore, Work
from model_core.linear import PlainProduct
from tests.model_core import tiny
from tests.model_core.language.test_decoder import random_sequence


def hidden(decoder: Decoder, *, by_module: bool = False) -> Tensor:
    """Of one prompt of 20 tokens or so."""
    ids, positions, _ = random_sequence(random.Random(0), 20)
    store = RowStore(decoder.cache_shape)
    store.open("a")
    if by_module:
        decoder._fused = None
    with torch.inference_mode():
        return decoder.forward(decoder.embed(torch.tensor(ids)), positions, store.begin([Work("a", 0, len(ids))]))


def build(model: nn.Module) -> Decoder:
    return Decoder(model.model.language_model, model.lm_head)


def first_attention(model: nn.Module) -> nn.Module:
    return model.model.language_model.layers[0].self_attn


def test_joined_layers_equal_the_modules() -> None:
    model = tiny.qwen_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    decoder = build(model)
    assert decoder._fused is not None
    found = hidden(decoder)
    assert torch.allclose(found, hidden(build(model), by_module=True), atol=1e-5)


def test_the_parameters_are_views_so_that_nothing_is_stale_and_nothing_is_held_twice() -> None:
    model = tiny.qwen_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decoder = build(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    attention = first_attention(model)
    end = attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes
    assert attention.k_proj.weight.data_ptr() == end
    first = hidden(decoder)
    with torch.no_grad():
        attention.k_proj.weight.mul_(-1)
        attention.v_proj.bias.add_(1)
    changed = hidden(decoder)
    assert not torch.allclose(changed, first, atol=1e-3)
    assert torch.allclose(changed, hidden(build(model), by_module=True), atol=1e-5)
    build(model)
    assert attention.k_proj.weight.data_ptr() == end, "a second engine joins nothing anew"


@pytest.mark.parametrize("num_bytes", [0, 2**40])
def test_logits_follow_the_head_whatever_multiplies(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "COPIED_BYTES", num_bytes)
    model = Qwen2_5_VLForConditionalGeneration(tiny.qwen_config(tie=False)).eval()
    decoder, x = build(model), torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.allclose(decoder.logits(x), model.lm_head(x), atol=1e-5)
    with torch.no_grad():
        model.lm_head.weight.mul_(-2)
    with torch.inference_mode():
        assert torch.allclose(decoder.logits(x), model.lm_head(x), atol=1e-5)
    model.lm_head.register_forward_hook(lambda *args: args[2] + 1)
    with torch.inference_mode():
        assert torch.allclose(decoder.logits(x), model.lm_head(x), atol=1e-5)


def test_a_large_model_is_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "COPIED_BYTES", 1000)
    model = tiny.qwen_model()
    decoder = build(model)
    qkv = decoder._fused._layers[0].qkv
    assert isinstance(qkv, PlainProduct)
    assert qkv.weight.data_ptr() == first_attention(model).q_proj.weight.data_ptr()
    assert torch.allclose(hidden(decoder), hidden(build(model), by_module=True), atol=1e-5)


def test_training_goes_on_through_the_views() -> None:
    model = tiny.qwen_model()
    decoder = build(model)
    hidden(decoder)
    loss = model(input_ids=torch.tensor([[10, 20, 30, 40]]), labels=torch.tensor([[10, 20, 30, 40]])).loss
    loss.backward()
    weight = first_attention(model).v_proj.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    before = hidden(decoder)
    with torch.no_grad():
        weight.sub_(weight.grad)
    assert not torch.equal(hidden(decoder), before)


@pytest.mark.parametrize("how", ["cast", "hook", "module"])
def test_a_change_of_the_model_is_noticed(how: str) -> None:
    model = tiny.qwen_model()
    decoder = build(model)
    before, attention = hidden(decoder), first_attention(model)
    if how == "cast":
        model.to(torch.float64).to(torch.float32)
        attention.q_proj.weight.data.mul_(-1)
    elif how == "hook":
        attention.q_proj.register_forward_hook(lambda *args: -args[2])
    else:
        attention.q_proj = nn.Linear(64, 64)
    changed = hidden(decoder)
    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.allclose(changed, hidden(build(model), by_module=True), atol=1e-5)
    assert (decoder._fused is None) == (how == "hook")


def test_after_a_change_under_inference_mode_the_model_can_still_be_trained() -> None:
    model = tiny.qwen_model()
    decoder = build(model)
    model.to(torch.float64).to(torch.float32)
    hidden(decoder)  # joins anew, inside inference mode
    assert decoder._fused is not None
    model(input_ids=torch.tensor([[10, 20]]), labels=torch.tensor([[10, 20]])).loss.backward()


def test_a_model_with_joined_layers_is_saved_whole(tmp_path: Path) -> None:
    encoder = tiny.encoder()
    assert encoder.engine.runner.decoder._fused is not None
    encoder.save_pretrained(tmp_path / "saved")
    again = type(encoder).from_pretrained(tmp_path / "saved", device="cpu")
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, encoder.model.state_dict()[name]), name
