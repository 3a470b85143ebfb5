"""Adapters: the same answers when put in and when folded in, and they alone train in their component."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from model_core.errors import ConfigError
from model_core.training.config import FreezeConfig, LoraConfig, TrainConfig
from model_core.training.freeze import resolve_freeze
from model_core.training.lora import apply_lora, merge_lora
from model_core.training.optim import build_optimizer
from tests.model_core import tiny
from tests.model_core.training.tasks import answer_hidden, answer_loss

LORA = LoraConfig.model_validate(
    {"llm": {"rank": 4}, "qwen_vision": {"rank": 2, "target_modules": ["qkv"]}, "dinov2": {"rank": 3}}
)
PICTURE = tiny.pixels((1, 4, 4))[0]
ANSWER = torch.tensor([30])


@torch.no_grad()
def _hidden(model: Any) -> torch.Tensor:
    return answer_hidden(model.eval(), PICTURE, ANSWER)[0]


def test_adapters_train_alone_and_fold_into_the_weights() -> None:
    model, plain = tiny.trained_model(), tiny.trained_model()
    names = list(plain.state_dict())
    before = _hidden(model)
    adapted = apply_lora(model, LORA, seed=1)
    assert len(adapted) == 2 * 7 + 4 + 2 * 6
    assert torch.equal(_hidden(model), before)
    config = TrainConfig(learning_rate=0.02)
    table = resolve_freeze(model, "full", config.stages()[0].learning_rates)
    states = {row.component: row.state for row in table.rows}
    assert (states["llm"], states["qwen_vision"], states["dinov2"], states["gate"]) == (*["LORA"] * 3, "TRAINABLE")
    table.apply(model)
    optimizer = build_optimizer(model, config, table)
    kept = {n: p.clone() for n, p in model.named_parameters() if not table.parameters[n].train}
    for _ in range(2):  # the first factors have a gradient only once the second ones have moved
        answer_loss(model, PICTURE, ANSWER).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    assert any(n.startswith("model.language_model.layers.0.self_attn.q_proj.base_layer") for n in kept)
    after = _hidden(model)
    assert not torch.allclose(after, before, atol=1e-2)
    assert merge_lora(model) == len(adapted)
    torch.testing.assert_close(_hidden(model), after, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == names
    assert merge_lora(model) == 0


def test_a_component_that_is_frozen_trains_no_adapters_and_rules_still_decide() -> None:
    model = tiny.trained_model()
    apply_lora(model, LORA, seed=1)
    frozen = resolve_freeze(model, "fusion_only")
    assert not any(".lora_" in name for name in frozen.trained_names)
    rule = {"pattern": "model.language_model.norm.weight", "train": True}
    table = resolve_freeze(model, FreezeConfig.model_validate({"mode": "llm_only", "rules": [rule]}))
    assert {n for n in table.trained_names if ".lora_" not in n} == {"model.language_model.norm.weight"}


def test_the_first_factors_are_a_function_of_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (tiny.trained_model() for _ in range(3))
    torch.manual_seed(5)
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        apply_lora(model, LORA, seed=seed)
    assert torch.equal(torch.rand(1), expected)
    name = "model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_what_can_not_be_adapted_is_refused() -> None:
    model = tiny.trained_model()
    with pytest.raises(ConfigError, match=r"nope.*q_proj"):
        apply_lora(model, LoraConfig.model_validate({"llm": {"target_modules": ["q_proj", "nope"]}}), seed=0)
    model = tiny.trained_model()
    assert apply_lora(model, LoraConfig(), seed=0) == []
    apply_lora(model, LORA, seed=0)
    with pytest.raises(ConfigError, match="already"):
        apply_lora(model, LORA, seed=0)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="extra 'train'"):
        apply_lora(tiny.dual_model(), LORA, seed=0)
