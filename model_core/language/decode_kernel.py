"""One decode step of Qwen2.5's decoder as a compiled function: all layers in one call, over arrays on the host.

A step of small models is mostly the way from one torch operation to the next: of 2.8 ms for one row of a 9 M model
1.1 were products. Here a step is five parallel loops a layer and nothing between them, without the GIL. Each row is
computed in the same order of operations however many there are, so its numbers don't depend on its company.

Knows arrays; no torch. Importing it costs numba's import (0.2 s, 60 MB); compiling takes about ten seconds and is kept
on the disk beside the module, or in numba's own cache folder where that can't be written.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import config, float32, get_num_threads, int64, njit, prange, set_num_threads, types
from numpy.typing import NDArray

from model_core.language.panels import PANEL, UNROLL, pack_columns

Array = NDArray[np.float32]
# Sums in any order and no signed zeros; but NaN and infinity stay what they are, since a broken row must show.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_LOOPS_ONLY = {
    "prange": True,
    **dict.fromkeys(
        ("setitem", "reduction", "numpy", "stencil", "fusion", "comprehension", "inplace_binop"),
        False,
    ),
}
_f = np.float32


class Weights(NamedTuple):
    """Of L layers: D wide, H heads of dh over K, F inner. Products as `pack_columns` (panels.py) lays them out."""

    input_norm: Array  # (L, D)
    qkv: Array  # (L, (H + 2K) * dh / PANEL, D / UNROLL, UNROLL, PANEL)
    qkv_bias: Array  # (L, (H + 2K) * dh / PANEL, PANEL)
    out: Array  # (L, D / PANEL, H * dh / UNROLL, UNROLL, PANEL)
    post_norm: Array  # (L, D)
    gate: Array  # (L, F / PANEL, D / UNROLL, UNROLL, PANEL)
    up: Array  # as gate
    down: Array  # (L, D / PANEL, F / UNROLL, UNROLL, PANEL)
    norm: Array  # (D,)


class Rows(NamedTuple):
    """B new tokens: where each one's keys and values go, and what it sees."""

    cos: Array  # (B, dh)
    sin: Array  # (B, dh)
    rows: NDArray[np.int64]  # (B,) its row in the cache
    ends: NDArray[np.int64]  # (B,) tokens of that row, the new one included
    cache: Array  # (L, 2, rows, K, T, dh)


@njit(fastmath=_FAST, inline="always")
def _exp(x):
    """Within two units in the last place from -87 to 88 and flat beyond; a vector at a time, which libm's is not.

    Cody and Waite, "Software Manual for the Elementary Functions" (1980), chapter 6: e^x = 2^n * e^r.
    """
    if x > _f(88.0):
        x = _f(88.0)
    if x < _f(-87.0):
        x = _f(-87.0)
    n = np.floor(x * _f(1.44269504) + _f(0.5))
    r = x - n * _f(0.693359375)
    r = r - n * _f(-2.12194440e-4)
    p = _f(1.0 / 5040.0)
    p = p * r + _f(1.0 / 720.0)
    p = p * r + _f(1.0 / 120.0)
    p = p * r + _f(1.0 / 24.0)
    p = p * r + _f(1.0 / 6.0)
    p = p * r + _f(0.5)
    p = p * r * r + r + _f(1.0)
    bits = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return p * bits.view(np.float32)


@njit(fastmath=_FAST)
def _rms_norm(x, weight, eps, out):
    for b in range(x.shape[0]):
        row, normed = x[b], out[b]
        total = _f(0.0)
        for d in range(row.shape[0]):
            total += row[d] * row[d]
        scale = _f(1.0) / np.sqrt(total / _f(row.shape[0]) + eps)
        for d in range(row.shape[0]):
            normed[d] = weight[d] * (row[d] * scale)


@njit(fastmath=_FAST)
def _add_panel(x, weight, y, p):
    """Columns of one panel: y[:, p] += x @ weight[p]. x (B, K / UNROLL, UNROLL), y (B, panels, PANEL)."""
    for k in range(x.shape[1]):
        w = weight[p, k]
        for b in range(x.shape[0]):
            part, sums = x[b, k], y[b, p]
            x0, x1, x2, x3, x4, x5, x6, x7 = part[0], part[1], part[2], part[3], part[4], part[5], part[6], part[7]
            for j in range(PANEL):
                sums[j] += (
                    x0 * w[0, j]
                    + x1 * w[1, j]
                    + x2 * w[2, j]
                    + x3 * w[3, j]
                    + x4 * w[4, j]
                    + x5 * w[5, j]
                    + x6 * w[6, j]
                    + x7 * w[7, j]
                )


@njit(fastmath=_FAST)
def _start_panel(y, p, values):
    for b in range(y.shape[0]):
        sums = y[b, p]
        for j in range(PANEL):
            sums[j] = values[j]


@njit(fastmath=_FAST)
def _gate_panel(gate, up, p):
    """gate[:, p] becomes silu(gate) * up."""
    for b in range(gate.shape[0]):
        g, u = gate[b, p], up[b, p]
        for j in range(PANEL):
            g[j] = g[j] / (_f(1.0) + _exp(-g[j])) * u[j]


@njit(fastmath=_FAST)
def _turn(x, cos, sin, out):
    """Rotary position of one head (dh,); the halves belong together."""
    half = x.shape[0] // 2
    for d in range(half):
        a, b = x[d], x[half + d]
        out[d] = a * cos[d] - b * sin[d]
        out[half + d] = b * cos[half + d] + a * sin[half + d]


@njit(fastmath=_FAST)
def _attend_head(query, keys, values, scores, out):
    """One scaled query (dh,) over keys and values (T, dh). scores (T,) is scratch; out (dh,)."""
    length, dim = keys.shape
    top = _f(-np.inf)
    for t in range(length):
        key = keys[t]
        score = _f(0.0)
        for d in range(dim):
            score += query[d] * key[d]
        scores[t] = score
        top = max(top, score)
    total = _f(0.0)
    for t in range(length):
        share = _exp(scores[t] - top)
        scores[t] = share
        total += share
    for d in range(dim):
        out[d] = _f(0.0)
    fours = length // 4
    for i in range(fours):
        t = 4 * i
        s0, s1, s2, s3 = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        for d in range(dim):
            out[d] += s0 * v0[d] + s1 * v1[d] + s2 * v2[d] + s3 * v3[d]
    for t in range(4 * fours, length):
        s0, v0 = scores[t], values[t]
        for d in range(dim):
            out[d] += s0 * v0[d]
    for d in range(dim):
        out[d] /= total


@njit(fastmath=_FAST)
def _attend_group(qkv, at, group, cache, out):
    """One row's new key and value into the cache, then the query heads that share them.

    qkv (H + 2K, dh) and out (H, dh) of the row; at: the row's cos, sin and end; group: number, H and K; cache: keys and
    values (T, dh) of the row's kv head.
    """
    (cos, sin, end), (number, num_heads, num_groups), (keys, values) = at, group, cache
    heads = num_heads // num_groups
    _turn(qkv[num_heads + number], cos, sin, keys[end - 1])
    new, last = qkv[num_heads + num_groups + number], values[end - 1]
    for d in range(new.shape[0]):
        last[d] = new[d]
    scale = _f(1.0) / np.sqrt(_f(keys.shape[1]))
    scores, query = np.empty(end, dtype=np.float32), np.empty(keys.shape[1], dtype=np.float32)
    for h in range(number * heads, (number + 1) * heads):
        _turn(qkv[h], cos, sin, query)
        for d in range(query.shape[0]):
            query[d] *= scale
        _attend_head(query, keys[:end], values[:end], scores, out[h])


@njit(fastmath=_FAST, nogil=True, cache=True, parallel=_LOOPS_ONLY)
def _step(hidden, weights, rows, num_heads, eps):
    """hidden (B, D), which is overwritten -> (B, D) after the last norm."""
    size, width = hidden.shape
    layers, groups, dim = rows.cache.shape[0], rows.cache.shape[3], rows.cache.shape[5]
    inner = weights.gate.shape[1] * PANEL
    x = np.empty((size, width), dtype=np.float32)
    qkv = np.empty((size, weights.qkv.shape[1], PANEL), dtype=np.float32)
    mixed = np.empty((size, num_heads, dim), dtype=np.float32)
    gate = np.empty((size, weights.gate.shape[1], PANEL), dtype=np.float32)
    up = np.empty((size, weights.gate.shape[1], PANEL), dtype=np.float32)
    zeros = np.zeros(PANEL, dtype=np.float32)
    # The same memory, as products read it (by UNROLL) and write it (by PANEL).
    total = hidden.reshape(size, width // PANEL, PANEL)
    from_x, from_gate = x.reshape(size, width // UNROLL, UNROLL), gate.reshape(size, inner // UNROLL, UNROLL)
    from_mixed = mixed.reshape(size, num_heads * dim // UNROLL, UNROLL)
    heads = qkv.reshape(size, num_heads + 2 * groups, dim)
    for i in range(layers):
        _rms_norm(hidden, weights.input_norm[i], eps, x)
        for p in prange(weights.qkv.shape[1]):
            _start_panel(qkv, p, weights.qkv_bias[i, p])
            _add_panel(from_x, weights.qkv[i], qkv, p)
        for pair in prange(size * groups):
            b = pair // groups
            number, row = pair - b * groups, rows.rows[b]
            at = (rows.cos[b], rows.sin[b], rows.ends[b])
            cache = (rows.cache[i, 0, row, number], rows.cache[i, 1, row, number])
            _attend_group(heads[b], at, (number, num_heads, groups), cache, mixed[b])
        for p in prange(weights.out.shape[1]):
            _add_panel(from_mixed, weights.out[i], total, p)
        _rms_norm(hidden, weights.post_norm[i], eps, x)
        for p in prange(weights.gate.shape[1]):
            _start_panel(gate, p, zeros)
            _start_panel(up, p, zeros)
            _add_panel(from_x, weights.gate[i], gate, p)
            _add_panel(from_x, weights.up[i], up, p)
            _gate_panel(gate, up, p)
        for p in prange(weights.down.shape[1]):
            _add_panel(from_gate, weights.down[i], total, p)
    _rms_norm(hidden, weights.norm, eps, x)
    return x


@njit(fastmath=_FAST, nogil=True, cache=True, parallel=_LOOPS_ONLY)
def _project(x, weight):
    """x (B, K) by a packed weight -> (B, columns with their padding)."""
    size = x.shape[0]
    y, zeros = np.empty((size, weight.shape[0], PANEL), dtype=np.float32), np.zeros(PANEL, dtype=np.float32)
    parts = x.reshape(size, x.shape[1] // UNROLL, UNROLL)
    for p in prange(weight.shape[0]):
        _start_panel(y, p, zeros)
        _add_panel(parts, weight, y, p)
    return y.reshape(size, weight.shape[0] * PANEL)


def _of(ndim: int, dtype: types.Type = float32) -> types.Array:
    return types.Array(dtype, ndim, "C")


_WEIGHTS = types.NamedTuple((_of(2), _of(5), _of(3), _of(5), _of(2), _of(5), _of(5), _of(5), _of(1)), Weights)
_ROWS = types.NamedTuple((_of(2), _of(2), _of(1, int64), _of(1, int64), _of(6)), Rows)


def load() -> None:
    """Compile, or take what was compiled before, and try it.

    Raises what numba raises: no threads that torch can share, no processor that it knows; without a folder to keep the
    code in, the import of this module has raised before.
    """
    config.THREADING_LAYER = "omp"  # torch's own threads serve it too, and callers may come from any thread
    _step.compile((_of(2), _WEIGHTS, _ROWS, int64, float32))
    _project.compile((_of(2), _of(4)))
    ones = np.ones((PANEL, PANEL), dtype=np.float32)
    if not np.allclose(project(ones, pack_columns(ones), PANEL, num_threads=1), PANEL):
        raise RuntimeError("compiled loops gave a wrong product on this processor")


def step(hidden: Array, weights: Weights, rows: Rows, *, num_heads: int, eps: float, num_threads: int) -> Array:
    """hidden (B, D), which is overwritten, through all layers -> (B, D) after the last norm; keys and values of the new
    tokens are in `rows.cache` then."""
    _use(num_threads)
    return _step(hidden, weights, rows, num_heads, _f(eps))


def project(x: Array, weight: Array, columns: int, *, num_threads: int) -> Array:
    """x (B, K) by a weight (columns, K) that was packed -> (B, columns)."""
    _use(num_threads)
    return _project(x, weight)[:, :columns]


def _use(num_threads: int) -> None:
    wanted = min(num_threads, config.NUMBA_NUM_THREADS)
    if get_num_threads() != wanted:  # is kept for each calling thread
        set_num_threads(wanted)
