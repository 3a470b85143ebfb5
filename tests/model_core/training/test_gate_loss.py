"""What each gate loss does to a gate: by hand, in memory over steps, and to the training of a bare fusion."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_core.errors import CheckpointMismatchError, ConfigError
from model_core.fusion.gated import GatedFusion
from model_core.training.config import TrainConfig
from model_core.training.losses import GateLoss, build_gate_loss, gate_statistics
from tests.model_core import tiny


def _config(name: str, **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"diversity_loss_weight": 1.0, "losses": {"diversity_loss": name, "anneal_ratio": None, **settings}}
    )


def _loss(name: str, **settings: Any) -> GateLoss:
    return GateLoss(name, 1.0, 2, _config(name, **settings))


EQUAL = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
DECIDED = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
COLLAPSED = torch.tensor([[1.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("name", "equal", "decided", "collapsed"),
    [
        ("marginal_kl", 0.0, 0.0, math.log(2)),
        ("mutual_information", math.log(2), 0.0, math.log(2)),
        ("load_balance", 1.0, 1.0, 2.0),
        ("per_sample_entropy", 0.0, math.log(2), math.log(2)),
    ],
)
def test_values_by_hand(name: str, equal: float, decided: float, collapsed: float) -> None:
    for weights, expected in ((EQUAL, equal), (DECIDED, decided), (COLLAPSED, collapsed)):
        assert float(_loss(name)(weights)) == pytest.approx(expected, abs=1e-5)


def test_the_value_looks_back_and_the_gradient_is_this_packs() -> None:
    loss = _loss("marginal_kl", ema_decay=0.5)
    loss(COLLAPSED)
    loss.end_step()
    weights = EQUAL.clone().requires_grad_()
    value = loss(weights)
    mean = torch.tensor([0.75, 0.25])
    assert float(value.detach()) == pytest.approx(float((mean * (2 * mean).log()).sum()), abs=1e-6)
    value.backward()
    assert float(weights.grad[0, 0] - weights.grad[0, 1]) > 0, "descent takes from the encoder that had too much"


def test_packs_of_a_step_count_by_their_images_and_once() -> None:
    loss, reduced = _loss("marginal_kl", ema_decay=0.0), []
    loss(COLLAPSED[:1])
    loss(torch.tensor([[0.0, 1.0]] * 3))
    loss.end_step(lambda sums: reduced.append(sums.clone()) or sums * 2)  # as two equal processes would
    assert loss.state_dict()["mean"] == pytest.approx([0.25, 0.75])
    assert reduced[0].tolist() == [1, 3, 1, 3, 4]
    loss.end_step()
    assert loss.state_dict()["num_steps"] == 1, "a step without images is no step of the gate"


def test_the_memory_goes_through_json_to_the_bit() -> None:
    first = _loss("load_balance")
    for seed in range(3):
        first(torch.randn(5, 2, generator=torch.Generator().manual_seed(seed)).softmax(-1))
        first.end_step()
    second = _loss("load_balance")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    weights = torch.tensor([[0.3, 0.7]])
    assert torch.equal(first(weights), second(weights))
    with pytest.raises(CheckpointMismatchError):
        _loss("marginal_kl").load_state_dict(first.state_dict())


def test_marginal_kl_fades_and_follows_its_prior() -> None:
    loss = _loss("marginal_kl", anneal_ratio=0.3, prior=[0.9, 0.1])
    scales = []
    for progress in (0.0, 0.15, 0.3, 1.0):
        loss.begin_step(progress)
        scales.append(loss.scale)
    assert scales == pytest.approx([1.0, 0.5, 0.0, 0.0])
    loss.begin_step(0.0)
    assert float(loss(torch.tensor([[0.9, 0.1]]))) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ConfigError):
        _loss("marginal_kl", prior=[0.2, 0.3, 0.5])


def test_a_strategy_without_a_gate_refuses_a_gate_loss() -> None:
    for fusion in ("concat", "static"):
        model = tiny.dual_model(fusion)
        assert build_gate_loss(model, TrainConfig()) is None
        prior = TrainConfig.model_validate({"losses": {"prior": [0.5, 0.5]}})
        for config in (_config("marginal_kl"), TrainConfig(diversity_loss_weight=0.1), prior):
            with pytest.raises(ConfigError, match="no gate"):
                build_gate_loss(model, config)
    gated = tiny.dual_model()
    assert build_gate_loss(gated, TrainConfig()).name == "marginal_kl"
    assert build_gate_loss(gated, _config("none")) is None


def test_statistics_tell_a_collapsed_gate_from_a_decided_one() -> None:
    assert gate_statistics(COLLAPSED)["gate_collapsed"]
    assert not gate_statistics(DECIDED)["gate_collapsed"]
    assert not gate_statistics(EQUAL)["gate_collapsed"]
    assert gate_statistics(EQUAL)["entropy"] == pytest.approx(1.0)


class _Holder(nn.Module):
    def __init__(self, fusion: GatedFusion) -> None:
        super().__init__()
        self.fusion = fusion


def _train_gate(name: str, seed: int, steps: int = 200, start: float = 0.5) -> tuple[Tensor, Tensor]:
    """A fusion whose second encoder is noise at first and what one picture in seven needs.

    start: the first encoder's weight in the first step.

    Returns:
        gate weights (I, 2) of the last batch, and which of its pictures need the second encoder.
    """
    torch.manual_seed(seed)
    width, images = 8, 32
    fusion = GatedFusion({"qwen": width, "dinov2": width}, width)
    fusion.reset_parameters()
    nn.init.normal_(fusion.projectors["dinov2"].weight, std=1.5)
    fusion.gate[-1].bias.data[0] = math.log(start / (1 - start))
    turn = torch.linalg.qr(torch.randn(width, width))[0]
    gate = list(fusion.gate.parameters())
    rest = [p for n, p in fusion.named_parameters() if not n.startswith("gate")]
    adam = torch.optim.Adam([{"params": rest, "lr": 1e-2}, {"params": gate, "lr": 3e-3}])
    fading = {"anneal_ratio": 0.5} if name == "marginal_kl" else {}
    settings = {"diversity_loss_weight": 20.0, "losses": {"diversity_loss": name, **fading}}
    loss_of_gate = build_gate_loss(_Holder(fusion), TrainConfig.model_validate(settings))
    for step in range(steps):
        needs = torch.rand(images) < 0.15
        kind = needs[:, None, None]
        q = torch.randn(images, 4, width) * torch.where(kind, 0.2, 1.0) + torch.where(kind, 1.0, -1.0)
        x = torch.randn(images, 4, width)
        target = torch.where(kind, nn.functional.layer_norm(x, (width,)) @ turn, q)
        output = fusion({"qwen": q.flatten(0, 1), "dinov2": x.flatten(0, 1)}, ((1, 2, 2),) * images)
        loss = (output.tokens - target.flatten(0, 1)).square().mean()
        if loss_of_gate is not None:
            loss_of_gate.begin_step(step / steps)
            loss = loss + loss_of_gate(output.weights)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if loss_of_gate is not None:
            loss_of_gate.end_step()
    return output.weights.detach(), needs


@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.heavy)])
def test_held_open_a_gate_learns_to_route(seed: int) -> None:
    """Without a loss it shuts the noisy encoder out before that has learnt. Squared errors are far larger here than a
    language loss, so the weight is twenty times the default: what that does in a run, test_gate_training.py shows."""
    alone, _ = _train_gate("none", seed)
    assert gate_statistics(alone)["gate_collapsed"]
    held, needs = _train_gate("marginal_kl", seed)
    assert not gate_statistics(held)["gate_collapsed"]
    assert float(held[needs, 1].mean()) > 3 * float(held[~needs, 1].mean()), "and which picture needs it is told apart"


def test_per_sample_entropy_pushes_every_picture_to_a_half() -> None:
    """From 0.8, those that need the second encoder and those that do not; without it none gets there."""
    first, _ = _train_gate("per_sample_entropy", 0, steps=1, start=0.8)
    torch.testing.assert_close(first[:, 0], torch.full((len(first),), 0.8))
    weights, needs = _train_gate("per_sample_entropy", 0, start=0.8)
    assert float((weights - 0.5).abs().max()) < 0.05
    assert needs.any() and not needs.all()
    alone, _ = _train_gate("none", 0, start=0.8)
    assert float((alone - 0.5).abs().min()) > 0.05
