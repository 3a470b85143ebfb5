"""Rows get into padding and out of it, and so do their gradients, as by torch's own split, pad, stack and cat."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model_core.rows import Move

LENGTHS = [3, 5, 1, 5, 2]
GROUPS = [([0, 2, 4], 3), ([1, 3], 5)]


def _by_torch(x: torch.Tensor) -> torch.Tensor:
    rows = x.split(LENGTHS)
    padded = [F.pad(rows[i], (0, 0, 0, 0, 0, length - len(rows[i]))) for members, length in GROUPS for i in members]
    return torch.cat(padded)


def test_padding_is_torchs_and_its_gradient_too() -> None:
    move, x = Move.pad(LENGTHS, GROUPS, torch.device("cpu")), torch.randn(16, 2, 4, requires_grad=True)
    wanted, found = _by_torch(x), move(x)
    assert torch.equal(found, wanted) and found.shape == (19, 2, 4)
    # A gradient at padding is nobody's.
    weights = torch.randn_like(found)
    assert torch.equal(
        torch.autograd.grad(found, x, weights, retain_graph=True)[0],
        torch.autograd.grad(wanted, x, weights, retain_graph=True)[0],
    )
    assert torch.equal(move.undo(found), x)


def test_the_way_back_gives_padding_no_gradient() -> None:
    move, padded = Move.pad(LENGTHS, GROUPS, torch.device("cpu")), torch.randn(19, 4, requires_grad=True)
    found = move.undo(padded)
    gradient = torch.autograd.grad(found, padded, torch.ones_like(found))[0]
    assert torch.equal(gradient, move(torch.ones(16, 4)))
    assert int((gradient == 0).all(-1).sum()) == 3


def test_gradients_agree_with_differences() -> None:
    move = Move.pad(LENGTHS, GROUPS, torch.device("cpu"))
    x = torch.randn(16, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: move(y).square(), x)
    assert torch.autograd.gradcheck(lambda y: move.undo(move(y).square()), x)


@pytest.mark.parametrize("lengths", [[4], [2, 2, 2]])
def test_samples_of_one_length_need_no_padding(lengths: list[int]) -> None:
    move = Move.pad(lengths, [(range(len(lengths)), lengths[0])], torch.device("cpu"))
    x = torch.randn(sum(lengths), 3)
    assert move.forth.empty is None and torch.equal(move(x), x)
