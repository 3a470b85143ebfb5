"""What rows of logits are computed with: numpy on CPUs, torch elsewhere, behind what they spell differently.

On a CPU the way to a torch operation takes ten times as long as its work over a row of a few thousand numbers, and a
draw has fifty. Everything else that `draws.py` and `logit_changes.py` do is written once for both. exp is torch's on
both sides: it gives a number the same result wherever it stands, takes all threads, and rounds better than numpy's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

#: A numpy array on CPUs, a tensor on the logits' device elsewhere.
Array = Any
_NEVER = float("-inf")


class HostArrays:
    """numpy's."""

    where, minimum = staticmethod(np.where), staticmethod(np.minimum)

    def of(self, tensor: Tensor) -> Array:
        return tensor.numpy()

    def upload(self, array: np.ndarray) -> Array:
        return array

    def fetch(self, arrays: dict[str, Array]) -> dict[str, np.ndarray]:
        return arrays

    def copy(self, array: Array) -> Array:
        return array.copy()

    def to_int(self, array: Array) -> Array:
        return array.astype(np.int64)

    def to_float(self, array: Array) -> Array:
        return array.astype(np.float32)

    def to_double(self, array: Array) -> Array:
        return array.astype(np.float64)

    def exp_(self, array: Array) -> None:
        torch.from_numpy(array).exp_()

    def most(self, array: Array, axis: int) -> Array:
        return array.max(axis)

    def highest(self, rows: Array) -> tuple[Array, Array]:
        """(R,) values and the first places where they are. NaN anywhere in a row is its highest."""
        places = rows.argmax(1)
        if len(rows) == 1:  # most steps of one stream: a slice takes a sixth of what indexing by arrays takes
            return rows[:, int(places[0])], places
        return rows[np.arange(len(rows)), places], places

    def top(self, rows: Array, count: int) -> tuple[Array, Array]:
        """(R, count) values, highest first, and their places. Which of several equal ones is not defined."""
        count = min(count, rows.shape[1])
        around, places = np.arange(len(rows))[:, None], None
        if count < rows.shape[1]:
            places = rows.argpartition(-count, 1)[:, -count:]
            rows = rows[around, places]
        order = (-rows).argsort(1)
        return rows[around, order], order if places is None else places[around, order]

    def falling(self, row: Array) -> Array:
        """(V,) sorted, highest first. Values alone: that takes a twentieth of the time that it takes with places."""
        return np.sort(row)[::-1].copy()

    def pad(self, rows: Array, missing: int) -> Array:
        return np.pad(rows, ((0, 0), (0, missing)), constant_values=_NEVER)

    def places_of(self, row: Array, value: float) -> Array:
        """Where the row has this value, rising."""
        return np.flatnonzero(row == np.float32(value))


class DeviceArrays:
    """torch's; see `HostArrays`."""

    where, minimum = staticmethod(torch.where), staticmethod(torch.minimum)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def of(self, tensor: Tensor) -> Array:
        return tensor

    def upload(self, array: np.ndarray) -> Array:
        return torch.from_numpy(array).to(self._device)

    def fetch(self, arrays: dict[str, Array]) -> dict[str, np.ndarray]:
        """All of them by one transfer, for which whole numbers become int64 and others float64."""
        wide = [one.double().view(torch.int64) if one.is_floating_point() else one.long() for one in arrays.values()]
        flat = torch.cat([one.reshape(-1) for one in wide]).cpu().numpy()
        found, start = {}, 0
        for name, one in arrays.items():
            part = flat[start : start + one.numel()].reshape(one.shape)
            found[name] = part.view(np.float64) if one.is_floating_point() else part
            start += one.numel()
        return found

    def copy(self, array: Array) -> Array:
        return array.clone()

    def to_int(self, array: Array) -> Array:
        return array.long()

    def to_float(self, array: Array) -> Array:
        return array.float()

    def to_double(self, array: Array) -> Array:
        return array.double()

    def exp_(self, array: Array) -> None:
        array.exp_()

    def most(self, array: Array, axis: int) -> Array:
        return array.amax(axis)

    def highest(self, rows: Array) -> tuple[Array, Array]:
        found = rows.max(-1)
        return found.values, found.indices

    def top(self, rows: Array, count: int) -> tuple[Array, Array]:
        return rows.topk(min(count, rows.shape[1]))

    def falling(self, row: Array) -> Array:
        return row.sort(descending=True).values

    def pad(self, rows: Array, missing: int) -> Array:
        return functional.pad(rows, (0, missing), value=_NEVER)

    def places_of(self, row: Array, value: float) -> Array:
        return (row == value).nonzero()[:, 0]


Arrays = HostArrays | DeviceArrays
_HOST = HostArrays()


def arrays_for(device: torch.device) -> Arrays:
    """What computes where these logits are."""
    return _HOST if device.type == "cpu" else DeviceArrays(device)
