"""Top-k and top-p over a row's best tokens, and which of them is drawn. Host arrays; many rows at once.

The order is by falling logit, among equals by rising id. What top-k and top-p keep is a beginning of it, so a few
hundred best tokens settle most rows; the rest of a row counts only by its mass. Masses are integers: no sum depends on
how much of the order is at hand, and a row that needs all of it gets the token that it would have got here.
"""

from __future__ import annotations

import numpy as np

from model_core.engine.row_arrays import Array, Arrays


def draw(
    masses: np.ndarray, totals: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, uniform: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where in the order each row's token is, and whether the tokens at hand were enough to know.

    Args:
        masses: (R, K) int64, of the best tokens. totals: (R,) int64, of all tokens.
        top_k: (R,), 0 for none. top_p: (R,) float64. uniform: (R,) float64 in [0, 1).
    """
    num_rows, width = masses.shape
    is_counted = top_k > 0
    if is_counted.any():
        masses = masses * ((np.arange(width) < top_k[:, None]) | ~is_counted[:, None])
    upto = masses.cumsum(1)
    totals = np.where(is_counted, upto[:, -1], totals)  # top-p is a share of what top-k leaves
    # A token stays while those before it are not enough.
    goals = np.where(top_p < 1.0, np.ceil(top_p * totals).astype(np.int64), totals)
    last = (upto[:, :-1] < goals[:, None]).sum(1)
    kept = upto[np.arange(num_rows), last]
    targets = np.minimum((uniform * kept).astype(np.int64), kept - 1)
    places = (upto <= targets[:, None]).sum(1)
    return places, np.where(is_counted, top_k <= width, kept >= goals)


def token_at(xp: Arrays, place: int, values: np.ndarray, tokens: np.ndarray | None, row: Array) -> int:
    """The id of the token at a place of the order.

    Args:
        values, tokens: of the row's best, equal ones in no order; without tokens they are looked for in the row.
        row: all its logits.
    """
    value, num_known = values[place], len(values)
    is_first = place == 0 or values[place - 1] > value
    if tokens is not None and is_first and place + 1 < num_known and values[place + 1] < value:
        return int(tokens[place])
    first, last = np.searchsorted(-values, -value, "left"), np.searchsorted(-values, -value, "right")
    if tokens is not None and (last < num_known or num_known == len(row)):
        return int(np.sort(tokens[first:last])[place - first])
    return int(xp.places_of(row, float(value))[place - first])
