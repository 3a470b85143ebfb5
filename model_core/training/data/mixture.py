"""Which samples an epoch has, and in which order: a function of seed, stage, epoch, sizes and weights, of nothing else.

In: sizes and weights of data sets; out: indices. Shuffles are sorts of a bit generator's raw output, which numpy keeps
the same over its versions, unlike those of its `Generator`. It reads no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_core.errors import ConfigError

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Mixture:
    """sizes: samples of each data set. shares: of an epoch, summing to 1; None is each sample once."""

    sizes: tuple[int, ...]
    shares: tuple[float, ...] | None

    @property
    def num_samples(self) -> int:
        """Of one epoch: all samples of the data sets that have a share."""
        shares = self.shares or (1.0,) * len(self.sizes)
        return sum(size for size, share in zip(self.sizes, shares, strict=True) if share)

    def draw(self, seed: int, stage: int, epoch: int) -> tuple[Indices, Indices]:
        """The epoch's samples in order: (data set, index within it), (N,) each.

        With shares each data set gets exactly its part of the N places, rounded; within one, no sample comes a second
        time before all have come.
        """
        total = self.num_samples
        counts = self.sizes if self.shares is None else _round_shares(self.shares, total)
        which = np.repeat(np.arange(len(counts)), counts)[permutation(total, seed, stage, epoch, 0)]
        index = np.empty(total, dtype=np.int64)
        for number, (size, count) in enumerate(zip(self.sizes, counts, strict=True), 1):
            passes = (
                [permutation(size, seed, stage, epoch, number, i) for i in range(-(-count // size))] if size else []
            )
            if count:
                index[which == number - 1] = np.concatenate(passes)[:count]
        return which, index


def mix(
    names: Sequence[str],
    sizes: Sequence[int],
    weights: Sequence[float | None],
    temperature: float = 1.0,
    stage_weights: Mapping[str, float] | None = None,
) -> Mixture:
    """weights ** (1 / temperature), normalised.

    Args:
        weights: of each data set; where all are None, and temperature is 1, each sample comes once. Where all are None
            and temperature is not 1, the sizes are the weights.
        stage_weights: instead of them, by name; a data set that is not named has none.
    Raises:
        ConfigError: a name that is unknown; no weight, or no data, left.
    """
    if unknown := sorted(set(stage_weights or ()) - set(names)):
        raise ConfigError(
            "dataset_weights name a data set that is not there", value=", ".join(unknown), allowed=", ".join(names),
            fix="Write a data set's name, or leave it out", param="dataset_weights",
        )  # fmt: skip
    asked = [stage_weights.get(name, 0.0) for name in names] if stage_weights is not None else list(weights)
    if all(weight is None for weight in asked):
        if temperature == 1.0 or len(names) == 1:
            return _checked(Mixture(tuple(sizes), None), names)
        asked = [float(size) for size in sizes]
    given = [1.0 if weight is None else weight for weight in asked]
    # Beside the largest, since a small number to the power of 1000 is 0.
    top = max(given)
    powers = [(weight / top) ** (1 / temperature) if weight else 0.0 for weight in given] if top else given
    total = sum(powers) or 1.0
    return _checked(Mixture(tuple(sizes), tuple(power / total for power in powers)), names)


def permutation(n: int, *words: int) -> Indices:
    """A shuffle of range(n) that these numbers determine."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(words)).random_raw(n), kind="stable")


def _round_shares(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers that sum to total, none further than 1 from its share (largest remainder)."""
    exact = [share * total for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def _checked(mixture: Mixture, names: Sequence[str]) -> Mixture:
    shares = mixture.shares or (1.0,) * len(names)
    empty = [name for name, size, share in zip(names, mixture.sizes, shares, strict=True) if share and not size]
    if not any(shares) or empty:
        raise ConfigError(
            "there is nothing to draw from", value=", ".join(empty) or "no weight above 0",
            allowed="at least one data set with a weight above 0, and a sample in each that has one",
            fix="Give the data set samples that can train, or the weight 0", param="dataset_weights",
        )  # fmt: skip
    return mixture
