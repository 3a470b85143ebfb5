"""Weights, entropy and contribution shares, by hand."""

from __future__ import annotations

import pytest
import torch

from model_core.fusion.attribution import UNTRAINED, contribution_share, describe_fusion, dominant, entropy
from model_core.fusion.base import FusionOutput


@pytest.mark.parametrize(
    ("weights", "name", "h"),
    [
        ({"qwen": 0.5, "dinov2": 0.5}, "tie", 1.0),
        ({"qwen": 1.0, "dinov2": 0.0}, "qwen", 0.0),
        ({"qwen": 0.25, "dinov2": 0.75}, "dinov2", 0.8112781),
    ],
)
def test_dominant_and_entropy(weights: dict[str, float], name: str, h: float) -> None:
    assert dominant(weights) == name
    assert entropy(weights) == pytest.approx(h)


def test_contribution_share_by_hand() -> None:
    u = torch.tensor([[3.0, 0.0]])
    v = torch.tensor([[0.0, 1.0]])
    assert contribution_share(u + v, {"qwen": u, "dinov2": v}) == {"qwen": 0.75, "dinov2": 0.25}


def test_an_encoder_that_only_cancels_contributes_nothing() -> None:
    u, v = torch.tensor([[4.0]]), torch.tensor([[-1.0]])
    assert contribution_share(u + v, {"qwen": u, "dinov2": v}) == {"qwen": 1.0, "dinov2": 0.0}


def test_nothing_at_all_has_no_share() -> None:
    zero = torch.zeros(2, 3)
    assert contribution_share(zero, {"qwen": zero, "dinov2": zero}) is None


def test_each_image_is_described_from_its_own_rows() -> None:
    q = torch.tensor([[1.0], [1.0], [2.0]])
    tokens = torch.tensor([[1.0], [1.0], [4.0]])
    output = FusionOutput(tokens, torch.tensor([[0.9, 0.1], [0.2, 0.8]]), q, {"qwen": q, "dinov2": tokens - q})
    first, second = describe_fusion(output, ["qwen", "dinov2"], [2, 1], is_trained=True, warnings=[(), ("animated",)])
    assert first.relative_update == 0.0
    assert second.relative_update == pytest.approx(1.0)
    assert first.contribution == {"qwen": 1.0, "dinov2": 0.0}
    assert second.contribution == {"qwen": 0.5, "dinov2": 0.5}
    assert (first.dominant_encoder, second.dominant_encoder) == ("qwen", "dinov2")
    assert second.warnings == ("animated",)


def test_an_untrained_model_says_so_beside_each_image() -> None:
    q = torch.ones(1, 1)
    (found,) = describe_fusion(FusionOutput(q, None, q), ["qwen", "dinov2"], [1], is_trained=False)
    assert found.weights is None
    assert found.dominant_encoder is None
    assert found.warnings == (UNTRAINED,)
