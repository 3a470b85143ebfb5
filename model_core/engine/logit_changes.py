"""What requests do to their logits before anything is drawn: masks, biases, least lengths, penalties.

Many rows at once: what each changes is gathered on the host as flat lists of (place, number) over all rows, so that the
device gets a few index operations however many rows there are. No place comes twice in a list: the order of writing
can't matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model_core.engine.row_arrays import Array, Arrays
from model_core.engine.sampler_state import SamplerState

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class RowChange:
    """One row's. mask: (V,) bool, what a grammar allows. The arrays of ids have no id twice."""

    mask: np.ndarray | None
    bias_ids: np.ndarray
    biases: np.ndarray
    end_ids: np.ndarray
    seen_ids: np.ndarray
    #: What a seen token loses after the repetition penalty.
    losses: np.ndarray
    repetition: float


def change_of(state: SamplerState) -> RowChange | None:
    """What this request changes now; None for nothing. Raises InvalidSchemaError: its grammar can't go on."""
    p, seen = state.params, state.seen
    if state.grammar is None and seen is None and not p.logit_bias and not state.is_too_short:
        return None
    mask = None if state.grammar is None else state.grammar.mask().numpy()
    losses = np.empty(0, np.float32)
    if seen is not None:
        frequency, presence = np.float32(p.frequency_penalty), np.float32(p.presence_penalty)
        losses = np.where(seen.counts > 0, frequency * seen.counts + presence, np.float32(0))
    return RowChange(
        mask,
        np.fromiter(p.logit_bias, np.int64),
        np.fromiter(p.logit_bias.values(), np.float32),
        np.array(state.end_ids if state.is_too_short else (), np.int64),
        np.empty(0, np.int64) if seen is None else seen.ids,
        losses,
        p.repetition_penalty,
    )


def apply_changes(xp: Arrays, logits: Array, changes: Sequence[RowChange | None]) -> Array:
    """(R, V) float32 with everything but temperature and filters applied; the same array if nothing changes."""
    rows = [(row, change) for row, change in enumerate(changes) if change is not None]
    if not rows:
        return logits
    logits = xp.copy(logits)
    for row, change in rows:
        if change.mask is not None:
            logits[row][xp.upload(~change.mask)] = _NEVER
    flat, width = logits.reshape(-1), logits.shape[1]
    if any(change.bias_ids.size for _, change in rows):
        places = _places(xp, [(row, change.bias_ids) for row, change in rows], width)
        flat[places] += _joined(xp, [change.biases for _, change in rows])
    ends = [(row, c.end_ids) for row, c in rows if c.end_ids.size and not _must_end(xp, logits[row], c)]
    if ends:
        flat[_places(xp, ends, width)] = _NEVER
    if any(change.seen_ids.size for _, change in rows):
        places = _places(xp, [(row, change.seen_ids) for row, change in rows], width)
        penalty = _joined(xp, [np.full(len(c.seen_ids), c.repetition, np.float32) for _, c in rows])
        values = flat[places]
        values = xp.where(values > 0, values / penalty, values * penalty)
        flat[places] = values - _joined(xp, [change.losses for _, change in rows])
    return logits


def _must_end(xp: Arrays, logits: Array, change: RowChange) -> bool:
    """Whether the grammar leaves nothing but ends: a minimum length can't make an answer longer that has no way on."""
    if change.mask is None:
        return False
    left = logits != _NEVER
    return int(left.sum()) == int(left[xp.upload(change.end_ids)].sum())


def _places(xp: Arrays, rows: Sequence[tuple[int, np.ndarray]], width: int) -> Array:
    """Where these ids of these rows lie in the flattened logits."""
    return xp.upload(np.concatenate([row * width + ids for row, ids in rows]))


def _joined(xp: Arrays, values: Sequence[np.ndarray]) -> Array:
    return xp.upload(np.concatenate(values))
