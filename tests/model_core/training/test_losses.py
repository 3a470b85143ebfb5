"""The language loss never crosses a sample, the logits' chunks change nothing, and encoder dropout is a pure draw."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_core.errors import InvalidRequestError
from model_core.training import losses
from model_core.training.losses import LabelRows, encoder_dropout, next_token_labels, sample_losses


def _by_hand(hidden: Tensor, weight: Tensor, labels: Tensor, lengths: list[int]) -> Tensor:
    sums = []
    for h, y in zip(hidden.split(lengths), labels.split(lengths), strict=True):
        each = F.cross_entropy((h[:-1] @ weight.T).float(), y[1:], reduction="none", ignore_index=-100)
        sums.append(each.sum())
    return torch.stack(sums)


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, lengths: list[int]) -> Tensor:
    rows = LabelRows.of(labels, lengths)
    return sample_losses(hidden[rows.places], weight, rows)


def _pack(rows: int = 40, vocabulary: int = 50) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 8, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 8, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels, [rows // 4, rows // 2, rows // 4]


def test_labels_shift_within_a_sample_only() -> None:
    shifted = next_token_labels(torch.tensor([1, 2, 3, 4, -100, 6]), [2, 1, 3])
    assert shifted.tolist() == [2, -100, -100, -100, 6, -100]
    with pytest.raises(InvalidRequestError):
        next_token_labels(torch.zeros(4), [2, 1])


@pytest.mark.parametrize("way", ["whole", "chunked", "own"])
def test_the_loss_and_its_gradients_by_any_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, lengths = _pack()
    expected = _by_hand(hidden, weight, labels, lengths)
    gradients = torch.autograd.grad(expected.sum(), (hidden, weight))
    if way != "whole":
        monkeypatch.setattr(losses, "_CHUNK_ABOVE_LOGITS", 200)
    if way == "own":
        monkeypatch.delattr(F, "linear_cross_entropy")
    found = _losses(hidden, weight, labels, lengths)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (hidden, weight)), gradients, atol=1e-5, rtol=1e-5)


def test_a_neighbour_changes_nothing_and_a_frozen_head_is_no_obstacle() -> None:
    hidden, weight, labels, lengths = _pack()
    alone = _losses(hidden, weight, labels, lengths)
    changed = labels.clone()
    changed[lengths[0]] = 7  # the first token of the second sample is nobody's target
    torch.testing.assert_close(_losses(hidden, weight, changed, lengths), alone)
    loss = _losses(hidden, weight.detach(), labels, lengths).sum()
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert not gradient[lengths[0] - 1].any(), "the last place of a sample predicts nothing"


def test_a_pack_without_labels_is_zero_and_differentiable() -> None:
    hidden, weight, labels, lengths = _pack()
    loss = _losses(hidden, weight, torch.full_like(labels, -100), lengths).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not hidden.grad.any()


def test_hidden_states_in_16_bits_have_a_loss_in_32() -> None:
    hidden, weight, labels, lengths = _pack()
    short = _losses(hidden.bfloat16(), weight, labels, lengths)
    assert short.dtype == torch.float32
    torch.testing.assert_close(short, _by_hand(hidden, weight, labels, lengths), rtol=0.02, atol=0.5)


def test_encoder_dropout_hides_one_at_most_and_depends_on_the_sample_alone() -> None:
    keys = [f"vqa:{i}:0:0" for i in range(4000)]
    mask = encoder_dropout(0.3, 2, [1] * 4000, keys, seed=5)
    assert mask.shape == (4000, 2)
    assert int(mask.sum(1).max()) == 1
    assert mask.float().mean(0).tolist() == pytest.approx([0.15, 0.15], abs=0.02)
    alone = [encoder_dropout(0.3, 2, [1], [key], seed=5) for key in keys[:50]]
    again = torch.cat([torch.zeros(1, 2, dtype=torch.bool) if one is None else one for one in alone])
    assert torch.equal(again, mask[:50])
    assert not torch.equal(encoder_dropout(0.3, 2, [1] * 50, keys[:50], seed=6), mask[:50])


def test_two_pictures_of_a_sample_are_drawn_apart_and_no_chance_is_no_mask() -> None:
    both = encoder_dropout(0.9, 2, [64], ["a"], seed=0)
    assert len({tuple(row) for row in both.tolist()}) == 3
    assert encoder_dropout(0.0, 2, [1, 0], ["a", "b"], seed=0) is None
    assert encoder_dropout(0.5, 2, [0], ["a"], seed=0) is None
