"""From a whole row of logits to little: the sum of its weights, one token, its best tokens; many rows at once.

A row's results are its own to the bit, alone and in any batch, on any number of threads. A sum of floats over a row is
not: its order depends on the tensor's shape. So rows are folded, half onto half, by additions of one element to
another, until a row is a few thousand columns; those become integers, whose sums have no order. A weight is
exp((logit - highest) / temperature), elementwise, so the largest is 1.

A row is read as lanes of columns: token = lane * number of columns + column.
"""

from __future__ import annotations

import numpy as np

from model_core.engine.row_arrays import Array, Arrays

#: Tokens in a column. A power of two: a row is folded by halves.
LANES = 64
#: A row so short is searched at once: finding the columns would take longer.
_FEW = 2**14


def pad(xp: Arrays, logits: Array) -> Array:
    """(R, V) to whole lanes, with tokens that can't come; the same array where nothing is missing."""
    missing = -logits.shape[1] % LANES
    return xp.pad(logits, missing) if missing else logits


def mass_bits(width: int) -> int:
    """Of a weight of 1 as an integer: a row's sum stays below 2**62."""
    return 62 - width.bit_length()


def weigh(xp: Arrays, logits: Array, highest: Array, temperature: Array = None, least: Array = None) -> Array:
    """(R, N) float32 from 0 to 1.

    Args:
        highest, temperature, least: (R,) float32. A weight below `least` is 0 (min-p); None is a temperature of 1 and
            no least.
    """
    weights = logits - highest[:, None]
    if temperature is not None:
        weights /= temperature[:, None]
    xp.exp_(weights)
    if least is not None:
        weights *= weights >= least[:, None]
    return weights


def to_mass(xp: Arrays, weights: Array, width: int) -> Array:
    """Weights as integers, for rows of `width` tokens."""
    return xp.to_int(weights * 2.0 ** mass_bits(width))


def column_masses(xp: Arrays, weights: Array) -> Array:
    """(R, C) int64 of (R, V): each column's sum."""
    folded = weights.reshape(len(weights), LANES, -1)
    while folded.shape[1] > 1:
        half = folded.shape[1] // 2
        folded = folded[:, :half] + folded[:, half:]
    return to_mass(xp, folded[:, 0], weights.shape[1])


def pick(xp: Arrays, weights: Array, columns: Array, uniform: Array) -> Array:
    """(R,) int64: a token of each row by its share of the row's mass. A column first, then one of its lanes.

    Args:
        columns: (R, C) from `column_masses`. uniform: (R,) float64 in [0, 1).
    """
    rows, num_columns = xp.upload(np.arange(len(weights))), columns.shape[1]
    upto = columns.cumsum(-1)
    target = _share(xp, upto[:, -1], uniform)
    column = _first_above(upto, target)
    own = columns[rows, column]
    # What is left of the number within the column is uniform again.
    rest = xp.to_double(target - (upto[rows, column] - own)) / xp.to_double(own)
    lanes = weights.reshape(len(weights), LANES, num_columns)[rows, :, column]
    upto = to_mass(xp, lanes, LANES).cumsum(-1)
    return _first_above(upto, _share(xp, upto[:, -1], rest)) * num_columns + column


def _share(xp: Arrays, total: Array, part: Array) -> Array:
    """`part` of an integer and less than it, though products round."""
    return xp.minimum(xp.to_int(xp.to_double(total) * part), total - 1)


def _first_above(upto: Array, target: Array) -> Array:
    """Within the row whatever stands there: rows with NaN are computed too, and thrown away."""
    return (upto[:, :-1] <= target[:, None]).sum(-1)


def best(xp: Arrays, logits: Array, count: int) -> tuple[Array, Array]:
    """(R, K) values, highest first, and their tokens. Which of several equal ones are among them is not defined.

    The best tokens lie in the columns with the best maxima, so only those are searched.
    """
    num_rows, width = logits.shape
    num_columns = width // LANES
    if num_columns < 2 * count or width < _FEW:
        return xp.top(logits, count)
    lanes = logits.reshape(num_rows, LANES, num_columns)
    rows = xp.upload(np.arange(num_rows))[:, None]
    _, columns = xp.top(xp.most(lanes, 1), count)
    # (R, count, LANES): the columns that may hold them.
    values, places = xp.top(lanes[rows, :, columns].reshape(num_rows, -1), count)
    return values, places % LANES * num_columns + columns[rows, places // LANES]
