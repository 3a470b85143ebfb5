"""An order of samples cut into packs, and packs dealt to steps and processes. Numbers in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_core.training.data.mixture import Indices


@dataclass(frozen=True, slots=True)
class PackPlan:
    """dataset, index: (N,) the epoch's samples in order. starts: (P + 1,) where packs begin, and N."""

    dataset: Indices
    index: Indices
    starts: Indices

    @property
    def num_packs(self) -> int:
        return len(self.starts) - 1

    def pack(self, number: int) -> list[tuple[int, int]]:
        """(data set, index) of each sample of a pack."""
        a, b = int(self.starts[number]), int(self.starts[number + 1])
        return list(zip(self.dataset[a:b].tolist(), self.index[a:b].tolist(), strict=True))


def cut_packs(lengths: NDArray[np.int64], batch_size: int, max_tokens: int) -> Indices:
    """Greedy, in order: a sample that does not fit closes the pack. No length may be above max_tokens."""
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    starts, at, total = [0], 0, len(lengths)
    while at < total:
        fits = int(np.searchsorted(ends, ends[at] + max_tokens, side="right")) - 1
        at = min(max(fits, at + 1), at + batch_size, total)
        starts.append(at)
    return np.asarray(starts, dtype=np.int64)


def num_steps(num_packs: int, accumulation: int, world_size: int) -> int:
    """Optimizer steps that so many packs make."""
    return -(-num_packs // (accumulation * world_size))


def packs_of_step(step: int, num_packs: int, accumulation: int, rank: int, world_size: int) -> list[int]:
    """This process's packs of a step: of every `world_size` neighbours it takes the one of its rank."""
    first = step * accumulation * world_size + rank
    return [p for p in range(first, first + accumulation * world_size, world_size) if p < num_packs]
