"""From logits to tokens. One generator a request, so that a seed means the same alone and in a batch.

Rows that ask for nothing special are answered by one argmax over the batch. All others are computed together where the
logits are, by operations whose results don't depend on who stands beside a row (`draws.py`), and come to the host
once. The order is vLLM's: log-probabilities from the raw logits; then mask, bias, minimum length, penalties
(`logit_changes.py`); then temperature, min-p, top-k, top-p (`choices.py`). A row's one random number comes from its own
generator, and what it draws is the inverse of the distribution at that number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from model_core.engine.logit_changes import change_of
from model_core.engine.row_arrays import Array, Arrays, HostArrays, arrays_for
from model_core.engine.row_errors import ROW_ERRORS
from model_core.engine.sampler_slab import Row, Sampled, Slab, not_finite
from model_core.engine.sampler_state import SamplerState, build_generator, check_params

__all__ = ["Sampled", "SamplerState", "build_generator", "check_params", "sample_batch"]

#: Logits in one go: on CPUs what stays in a core's cache, elsewhere what takes little memory.
_CPU_LOGITS, _DEVICE_LOGITS = 2**17, 2**23


def sample_batch(logits: Tensor, states: Sequence[SamplerState], xp: Arrays | None = None) -> list[Sampled | Exception]:
    """One token a row, or that row's error.

    Args:
        logits: (B, V) float32, on any device; states: B of them. xp: what computes, by default what suits the device.
    """
    xp = arrays_for(logits.device) if xp is None else xp
    batch = xp.of(logits)
    values, tokens = xp.highest(batch)
    special = [index for index, state in enumerate(states) if not state.is_plain]
    if not special:
        host = xp.fetch({"values": values, "tokens": tokens})
        sound, greedy = np.isfinite(host["values"]).tolist(), host["tokens"].tolist()
        return [Sampled(token) if sound[index] else not_finite() for index, token in enumerate(greedy)]
    rows, found = _begin(states, special)
    sampled, host = _sample_rows(xp, batch, {"values": values, "tokens": tokens}, rows)
    sound, greedy = np.isfinite(host["values"]).tolist(), host["tokens"].tolist()
    found |= sampled
    return [
        not_finite() if not sound[index] else found[index] if index in found else Sampled(token)
        for index, token in enumerate(greedy)
    ]


def _begin(states: Sequence[SamplerState], special: Sequence[int]) -> tuple[list[Row], dict[int, Sampled | Exception]]:
    """The rows that are not plain, and the errors of those that can't go on."""
    rows: list[Row] = []
    failed: dict[int, Sampled | Exception] = {}
    for index in special:
        state = states[index]
        try:
            rows.append(Row(index, state, change_of(state), state.draw()))
        except ROW_ERRORS as error:  # this row's own: the others must not feel it
            failed[index] = error
    return rows, failed


def _sample_rows(
    xp: Arrays, batch: Array, peaks: dict[str, Array], rows: Sequence[Row]
) -> tuple[dict[int, Sampled | Exception], dict[str, np.ndarray]]:
    """What these rows get, and the whole batch's `peaks` on the host: they come with the same transfer.

    An error that comes of all rows together, such as no memory, leaves each to be tried alone.
    """
    if not rows:
        return {}, xp.fetch(peaks)
    try:
        size = max(1, (_CPU_LOGITS if isinstance(xp, HostArrays) else _DEVICE_LOGITS) // batch.shape[1])
        # Rows with NaN are computed too, and thrown away.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            slabs = [Slab(xp, batch, peaks, rows[start : start + size]) for start in range(0, len(rows), size)]
            sent = {f"{n} {name}": array for n, slab in enumerate(slabs) for name, array in slab.sent.items()}
            host = xp.fetch(peaks | sent)
            found: dict[int, Sampled | Exception] = {}
            for n, slab in enumerate(slabs):
                found |= slab.finish({name: host[f"{n} {name}"] for name in slab.sent})
        return found, host
    except ROW_ERRORS as error:
        if len(rows) == 1:
            return {rows[0].index: error}, xp.fetch(peaks)
    alone = [_sample_rows(xp, batch, peaks, [row]) for row in rows]
    return {index: one for part, _ in alone for index, one in part.items()}, alone[0][1]
