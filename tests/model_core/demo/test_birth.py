"""The demo's encoders attend at birth as they are said to: to what is alike and near, and take it away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model_core.demo.birth import sine_places
from model_core.demo.blank import blank_model


@pytest.fixture(scope="module")
def born() -> Any:
    return blank_model(seed=3, hidden=128, llm_layers=1, vision_layers=1, dinov2_layers=1)[0].model


def _weights(born: Any, tower: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, output of the first layer, as x @ w.T takes them."""
    if tower == "dinov2":
        found = born.second.encoder.layer[0].attention
        return tuple(getattr(found, f"{name}_proj").weight.detach() for name in "qkvo")
    found = born.visual.blocks[0].attn
    return (*found.qkv.weight.detach().chunk(3), found.proj.weight.detach())


@pytest.mark.parametrize("tower", ["dinov2", "qwen"])
def test_a_token_looks_at_what_is_like_it_and_its_value_is_taken_away(born: Any, tower: str) -> None:
    """On random tokens: each head's score of a token with itself above that with others; the output against it."""
    query, key, value, output = _weights(born, tower)
    tokens = torch.randn(200, 192, generator=torch.Generator().manual_seed(0))
    for head in range(3):
        rows = slice(64 * head, 64 * (head + 1))
        scores = (tokens @ query[rows].T) @ (tokens @ key[rows].T).T
        own, others = scores.diagonal(), scores[~torch.eye(200, dtype=torch.bool)]
        assert float(own.mean()) > 2 * float(others.std())
    moved = tokens @ value.T @ output.T
    assert -0.7 < float((moved * tokens).sum() / tokens.square().sum()) < -0.2


def test_two_births_of_one_seed_are_one(born: Any) -> None:
    again = blank_model(seed=3, hidden=128, llm_layers=1, vision_layers=1, dinov2_layers=1)[0].model
    assert all(torch.equal(a, b) for a, b in zip(born.parameters(), again.parameters(), strict=True))
    other = blank_model(seed=4, hidden=128, llm_layers=1, vision_layers=1, dinov2_layers=1)[0].model
    assert not torch.equal(_weights(born, "dinov2")[0], _weights(other, "dinov2")[0])


def test_places_are_more_alike_the_nearer_they_are(born: Any) -> None:
    places = sine_places(12, 192).view(12, 12, 192)
    assert torch.equal(born.second.embeddings.position_embeddings[0, 1:].detach(), places.view(144, 192))
    middle = (places * places[4, 4]).sum(-1)
    assert float(middle[4, 4]) == pytest.approx(96, rel=1e-4)
    assert middle[4, 4] > middle[4, 5] > middle[4, 6] > middle[4, 9]
    assert middle[4, 4] > middle[5, 4] > middle[6, 4] > middle[9, 4]
    assert float(middle[4, 5]) == pytest.approx(float(middle[5, 4]), rel=1e-4)
