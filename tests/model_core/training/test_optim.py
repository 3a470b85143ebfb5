"""One optimizer by name: state that outlives freezing, masters, accumulation, clipping and an exact resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from model_core.errors import CheckpointMismatchError
from model_core.model import DualVisionModel
from model_core.training.config import TrainConfig
from model_core.training.freeze import FreezeTable, resolve_freeze
from model_core.training.optim import NamedOptimizer, build_optimizer
from tests.model_core import tiny
from tests.model_core.training.tasks import answer_loss

CONFIG = TrainConfig(learning_rate=1e-3, weight_decay=0.1, rewarm_steps=0)


def _table(model: DualVisionModel, mode: Any, config: TrainConfig = CONFIG) -> FreezeTable:
    table = resolve_freeze(model, mode, config.stages()[0].learning_rates)
    table.apply(model)
    return table


def _train(model: DualVisionModel, optimizer: NamedOptimizer, seeds: range) -> float:
    norm = 0.0
    for seed in seeds:
        answer_loss(model, tiny.pixels((1, 4, 4), seed=seed)[0], torch.tensor([20 + seed])).backward()
        norm = optimizer.step()
        optimizer.zero_grad()
    return norm


def _built(mode: Any, config: TrainConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny.trained_model().to(dtype)
    return model, build_optimizer(model, config, _table(model, mode, config))


def _saved(model: DualVisionModel, optimizer: NamedOptimizer) -> tuple[dict[str, Tensor], bytes, dict[str, Any]]:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, save(optimizer.state_tensors()), optimizer.scalars()


def _resumed(saved: Any, mode: Any, config: TrainConfig, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny.trained_model(seed=9).to(dtype)
    model.load_state_dict(saved[0])
    optimizer = build_optimizer(model, config, _table(model, mode, config))
    optimizer.load_scalars(saved[2])
    optimizer.load_state_tensors(load(saved[1]))
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resume_between_freezings_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    """State of what is frozen at the save must come back when it trains again (pytorch #192202 loses it)."""
    config = CONFIG.model_copy(update={"rewarm_steps": 4})
    model, optimizer = _built("qwen_only", config, dtype)
    _train(model, optimizer, range(2))
    optimizer.set_freeze(_table(model, "fusion_only", config))
    _train(model, optimizer, range(2, 3))
    saved = _saved(model, optimizer)

    def finish(model: DualVisionModel, optimizer: NamedOptimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        optimizer.set_freeze(_table(model, "encoders_only", config))
        optimizer.set_learning_rate(0.7)
        _train(model, optimizer, range(3, 6))
        return dict(model.state_dict()), optimizer.state_tensors()

    weights, state = finish(model, optimizer)
    again, state_again = finish(*_resumed(saved, "fusion_only", config, dtype))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)


def test_what_is_frozen_keeps_its_moments_and_what_never_trained_has_none() -> None:
    model, optimizer = _built("qwen_only")
    _train(model, optimizer, range(1))
    tower = "model.visual.blocks.0.attn.qkv.weight"
    kept = optimizer.state_tensors()[f"{tower}/exp_avg"].clone()
    optimizer.set_freeze(_table(model, "llm_only"))
    before = model.get_parameter(tower).clone()
    _train(model, optimizer, range(1, 3))
    state = optimizer.state_tensors()
    assert torch.equal(state[f"{tower}/exp_avg"], kept)
    assert torch.equal(model.get_parameter(tower), before)
    assert not any(name.startswith("model.dinov2.") for name in state)
    assert float(state[f"{tower}/step"]) == 1
    optimizer.reset()
    assert optimizer.state_tensors() == {}


def test_weights_in_16_bits_follow_their_float32_masters() -> None:
    """At a rate far below bfloat16's spacing a weight must still move after enough steps."""
    config = TrainConfig(learning_rate=1e-5, lr_schedule="constant")
    model, optimizer = _built("fusion_only", config, torch.bfloat16)
    name = "model.fusion.projectors.qwen.weight"
    masters = [optimizer.state_tensors()[f"{name}/master"].clone()]
    _train(model, optimizer, range(1))
    masters.append(optimizer.state_tensors()[f"{name}/master"].clone())
    assert masters[0].dtype == torch.float32
    moved = (masters[1] - masters[0]).abs()
    assert 0 < float(moved.max()) < 2e-5
    assert torch.equal(masters[1].bfloat16(), model.get_parameter(name))


def test_gradients_in_16_bits_are_added_up_in_float32() -> None:
    model, optimizer = _built("fusion_only", dtype=torch.bfloat16)
    parameter = model.fusion.projectors["qwen"].bias
    parameter.grad = torch.full_like(parameter, 256.0)
    optimizer.accumulate()
    for _ in range(4):
        parameter.grad = torch.full_like(parameter, 0.5)  # 256.5 is no bfloat16
        optimizer.accumulate()
    assert float(optimizer.gradients()["model.fusion.projectors.qwen.bias"][0]) == 258.0


def test_clipping_bounds_the_step_and_reports_the_norm_before() -> None:
    """AdamW's first step does not depend on the gradient's length; its moments do."""
    _, optimizer = _built("fusion_only", TrainConfig(max_grad_norm=0.5))
    for parameter in optimizer.trained.values():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in optimizer.trained.values())
    assert optimizer.step() == pytest.approx(math.sqrt(count), rel=1e-5)
    moments = [t for name, t in optimizer.state_tensors().items() if name.endswith("/exp_avg")]
    assert float(torch.cat([m.flatten() for m in moments]).norm()) == pytest.approx(0.1 * 0.5, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    model, optimizer = _built("fusion_only")
    _train(model, optimizer, range(1))
    weights, state, scalars = _saved(model, optimizer)
    for parameter in optimizer.trained.values():
        parameter.grad = torch.ones_like(parameter)
    model.fusion.gate[0].bias.grad[0] = bad
    assert not math.isfinite(optimizer.step())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert save(optimizer.state_tensors()) == state
    assert optimizer.scalars() == scalars


def test_what_is_unfrozen_late_warms_up_and_the_rest_does_not() -> None:
    config = TrainConfig(learning_rate=1e-3, rewarm_steps=3)
    model, optimizer = _built("fusion_only", config)
    assert set(optimizer.learning_rates.values()) == {1e-3}
    _train(model, optimizer, range(2))
    optimizer.set_freeze(_table(model, "dinov2_only", config))
    seen = []
    for step in range(4):
        optimizer.set_learning_rate(0.5)
        seen.append(optimizer.learning_rates["dinov2"])
        assert optimizer.learning_rates["gate"] == 0.5e-3
        _train(model, optimizer, range(step, step + 1))
    assert seen == pytest.approx([0.125e-3, 0.25e-3, 0.375e-3, 0.5e-3])


def test_rates_by_component_and_by_rule_and_no_decay_on_vectors() -> None:
    config = TrainConfig(learning_rates={"gate": 3e-4}, weight_decay=0.1)
    model, optimizer = _built("full", config)
    assert optimizer.learning_rates["gate"] == 3e-4
    assert optimizer.learning_rates["qwen_vision"] == 2e-6
    bias = model.fusion.gate[0].bias
    weight = model.fusion.gate[0].weight
    before = bias.clone(), weight.clone()
    for parameter in optimizer.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(bias, before[0])
    assert torch.allclose(weight, before[1] * (1 - 3e-4 * 0.1))


def test_another_models_state_is_refused() -> None:
    _, optimizer = _built("fusion_only")
    for key, tensor in (("nobody/exp_avg", torch.zeros(1)), ("lm_head.weight/exp_avg", torch.zeros(2)),
                        ("model.fusion.gate.0.bias/exp_avg", torch.zeros(3)),
                        ("model.fusion.gate.0.bias/momentum", torch.zeros(128))):  # fmt: skip
        with pytest.raises(CheckpointMismatchError):
            optimizer.load_state_tensors({key: tensor})
