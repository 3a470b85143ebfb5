"""Rows moved into padding and out of it, by gathers both ways.

Where every row is taken at most once, the gradient of a gather is a gather too. torch can't know that: it adds rows up
one after the other (index_select), or makes a tensor for each piece (split, pad, stack and cat: of 64 samples in 5
layers thousands, a tenth of a training step). Knows tensors; no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """Which row comes where: index (n,), and the places (k,) that get zeros instead; None where there are none."""

    index: Tensor
    empty: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(S, ...) -> (n, ...)."""
        out = x.index_select(0, self.index)
        return out if self.empty is None else out.index_fill_(0, self.empty, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """A gather and the one that undoes it."""

    forth: Gather
    back: Gather

    @classmethod
    def pad(cls, lengths: Sequence[int], groups: Sequence[tuple[Sequence[int], int]], device: torch.device) -> Move:
        """Samples that lie end to end -> group after group, each sample padded to its group's length.

        lengths: of the samples. groups: (samples' numbers, length), each sample once.
        """
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        found = []
        for members, length in groups:
            own, at = torch.tensor(members), torch.arange(length)
            found.append(torch.where(at < sizes[own, None], starts[own, None] + at, -1).flatten())
        index = torch.cat(found)
        is_row = index >= 0
        places = torch.empty(int(sizes.sum()), dtype=torch.long)
        places[index[is_row]] = is_row.nonzero()[:, 0]
        empty = None if bool(is_row.all()) else (~is_row).nonzero()[:, 0].to(device)
        return cls(Gather(index.clamp(min=0).to(device), empty), Gather(places.to(device)))

    def __call__(self, x: Tensor) -> Tensor:
        """(S, ...) -> (n, ...)."""
        return _Moved.apply(x, self.forth, self.back)  # type: ignore[no-any-return]

    def undo(self, x: Tensor) -> Tensor:
        """(n, ...) -> (S, ...)."""
        return _Moved.apply(x, self.back, self.forth)  # type: ignore[no-any-return]


class _Moved(torch.autograd.Function):
    """A gather whose gradient is the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: Gather, back: Gather) -> Tensor:
        ctx.back = back
        return forth(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None
