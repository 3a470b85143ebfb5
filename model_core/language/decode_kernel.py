"""One step of Qwen2.5's decoder as a compiled function: all layers in one call, over arrays on the host.

A step of small models is mostly the way from one torch operation to the next: of 2.8 ms for one row of a 9 M model
1.1 were products. Here a step is five parallel loops a layer and nothing between them, without the GIL. Each row is
computed in the same order of operations however many there are, so its numbers don't depend on its company.

Products are what a step is made of, so their innermost loop is written in LLVM's own terms (`_build_tile`): numba's
loops went through memory where sums can stay in registers, 25 to 60 GFLOP/s of two AVX2 cores instead of 100 to 120.

Knows arrays; no torch. Importing it costs numba's import (0.2 s, 60 MB); compiling takes about ten seconds and is kept
on the disk beside the module, or in numba's own cache folder where that can't be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, float32, get_num_threads, int64, njit, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from model_core.language.panels import PANEL, pack_columns

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
#: Of one vector register with AVX. Twice as many, where a processor has them, gained nothing in numba's own loops; in
#: these nobody has tried.
_LANES = 8
#: Inner length of one turn: so much of a panel stays in the first cache while all rows pass over it.
_DEPTH = 128
_WORD = ir.IntType(64)


class Weights(NamedTuple):
    """Of L layers: D wide, H heads of dh over K, F inner. Products as `pack_columns` (panels.py) lays them out."""

    input_norm: Array  # (L, D)
    qkv: Array  # (L, (H + 2K) * dh / PANEL, D, PANEL)
    qkv_bias: Array  # (L, (H + 2K) * dh / PANEL, PANEL)
    out: Array  # (L, D / PANEL, H * dh, PANEL)
    post_norm: Array  # (L, D)
    gate: Array  # (L, F / PANEL, D, PANEL)
    up: Array  # as gate
    down: Array  # (L, D / PANEL, F, PANEL)
    norm: Array  # (D,)


class Rows(NamedTuple):
    """B new tokens: where each one's keys and values go, and what it sees (of a prompt those before it, new or not)."""

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


class _TileWriter:
    """Writes a tile's code: vectors of consecutive elements, and one number spread over a vector."""

    _VECTOR = ir.VectorType(ir.FloatType(), _LANES)
    _WIDTH = PANEL // _LANES
    _FUSED = ("contract",)

    def __init__(self, builder: ir.IRBuilder, num_rows: int) -> None:
        self._builder = builder
        self._sums = [[cgutils.alloca_once(builder, self._VECTOR) for _ in range(self._WIDTH)] for _ in range(num_rows)]

    def place(self, base: ir.Value, *offsets: ir.Value) -> ir.Value:
        for offset in offsets:
            base = self._builder.gep(base, [offset])
        return base

    def row(self, base: ir.Value, at: ir.Value, distance: ir.Value, number: int) -> ir.Value:
        return self.place(base, at, self._builder.mul(distance, _WORD(number)))

    def _vectors(self, base: ir.Value) -> list[ir.Value]:
        kind = self._VECTOR.as_pointer()
        return [self._builder.bitcast(self.place(base, _WORD(j * _LANES)), kind) for j in range(self._WIDTH)]

    def load(self, rows: list[ir.Value]) -> None:
        for row, sums in zip(rows, self._sums, strict=True):
            for at, kept in zip(self._vectors(row), sums, strict=True):
                self._builder.store(self._builder.load(at, align=4), kept)

    def store(self, rows: list[ir.Value]) -> None:
        for row, sums in zip(rows, self._sums, strict=True):
            for at, kept in zip(self._vectors(row), sums, strict=True):
                self._builder.store(self._builder.load(kept), at, align=4)

    def add(self, factors: list[ir.Value], weights: ir.Value) -> None:
        """Each row's factor times one line of the panel."""
        builder = self._builder
        line = [builder.load(at, align=4) for at in self._vectors(weights)]
        for at, sums in zip(factors, self._sums, strict=True):
            factor = self._spread(builder.load(at))
            for kept, weight in zip(sums, line, strict=True):
                product = builder.fmul(factor, weight, flags=self._FUSED)
                builder.store(builder.fadd(builder.load(kept), product, flags=self._FUSED), kept)

    def _spread(self, number: ir.Value) -> ir.Value:
        empty = ir.Constant(self._VECTOR, ir.Undefined)
        firsts = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
        return self._builder.shuffle_vector(
            self._builder.insert_element(empty, number, ir.IntType(32)(0)), empty, firsts
        )


def _build_tile(num_rows: int) -> Callable[..., None]:
    """A product of so many rows by one panel, whose sums stay in registers: y[r] += x[r] @ w, one multiplication and
    addition after the other along the inner length, so that a row's sums are the same whoever is beside it.

    The function takes float32 arrays (x, w, y) and, counted in elements: where each begins, the distance of two rows of
    x and of y, and the inner length.
    """

    def tile(typing: Any, arrays: Any, places: Any, distances: Any, length: Any) -> tuple[Any, Any]:
        del typing
        return types.void(arrays, places, distances, length), generate

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        arrays = zip(signature.args[0].types, cgutils.unpack_tuple(builder, args[0]), strict=True)
        x, w, y = (context.make_array(kind)(context, builder, value=value).data for kind, value in arrays)
        (x_at, w_at, y_at), (x_row, y_row) = (cgutils.unpack_tuple(builder, one) for one in args[1:3])
        writer = _TileWriter(builder, num_rows)
        targets = [writer.row(y, y_at, y_row, number) for number in range(num_rows)]
        sources = [writer.row(x, x_at, x_row, number) for number in range(num_rows)]
        writer.load(targets)
        with cgutils.for_range(builder, args[3]) as loop:
            line = writer.place(w, w_at, builder.mul(loop.index, _WORD(PANEL)))
            writer.add([writer.place(source, loop.index) for source in sources], line)
        writer.store(targets)
        return context.get_dummy_value()

    return intrinsic(tile)


# Two rows take 14 of the 16 vector registers that every x86-64 with AVX has; with three they no longer suffice.
_one_row, _two_rows = _build_tile(1), _build_tile(2)


@njit(fastmath=_FAST)
def _add_panel(x, weight, y, p):
    """Columns of one panel: y[:, p * PANEL:] += x @ weight[p]. x (B, K), weight (panels, K, PANEL), y (B, N)."""
    size, inner = x.shape
    columns = y.shape[1]
    for k in range(0, inner, _DEPTH):
        depth = min(_DEPTH, inner - k)
        w_at = (p * inner + k) * PANEL
        for b in range(0, size - 1, 2):
            _two_rows((x, weight, y), (b * inner + k, w_at, b * columns + p * PANEL), (inner, columns), depth)
        if size % 2:
            b = size - 1
            _one_row((x, weight, y), (b * inner + k, w_at, b * columns + p * PANEL), (inner, columns), depth)


@njit(fastmath=_FAST)
def _start_panel(y, p, values):
    for b in range(y.shape[0]):
        sums = y[b, p * PANEL : (p + 1) * PANEL]
        for j in range(PANEL):
            sums[j] = values[j]


@njit(fastmath=_FAST)
def _gate_panel(gate, up, p):
    """gate[:, p] becomes silu(gate) * up."""
    for b in range(gate.shape[0]):
        g, u = gate[b, p * PANEL : (p + 1) * PANEL], up[b, p * PANEL : (p + 1) * PANEL]
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
def _remember(key, value, at, cache):
    """One token's new key and value (dh,) of one head into the cache; at: the token's cos, sin and end."""
    (cos, sin, end), (keys, values) = at, cache
    _turn(key, cos, sin, keys[end - 1])
    last = values[end - 1]
    for d in range(value.shape[0]):
        last[d] = value[d]


@njit(fastmath=_FAST)
def _attend_group(queries, at, cache, out):
    """One token's query heads (n, dh) that share the keys and values (T, dh) of the cache; out (n, dh)."""
    (cos, sin, end), (keys, values) = at, cache
    scale = _f(1.0) / np.sqrt(_f(keys.shape[1]))
    scores, query = np.empty(end, dtype=np.float32), np.empty(keys.shape[1], dtype=np.float32)
    for h in range(queries.shape[0]):
        _turn(queries[h], cos, sin, query)
        for d in range(query.shape[0]):
            query[d] *= scale
        _attend_head(query, keys[:end], values[:end], scores, out[h])


@njit(fastmath=_FAST, nogil=True, cache=True, parallel=_LOOPS_ONLY)
def _step(hidden, weights, rows, num_heads, eps):
    """hidden (B, D), which is overwritten -> (B, D) after the last norm."""
    size, width = hidden.shape
    layers, groups, dim = rows.cache.shape[0], rows.cache.shape[3], rows.cache.shape[5]
    inner, shared = weights.gate.shape[1] * PANEL, num_heads // groups
    x = np.empty((size, width), dtype=np.float32)
    qkv = np.empty((size, weights.qkv.shape[1] * PANEL), dtype=np.float32)
    mixed = np.empty((size, num_heads * dim), dtype=np.float32)
    gate = np.empty((size, inner), dtype=np.float32)
    up = np.empty((size, inner), dtype=np.float32)
    zeros = np.zeros(PANEL, dtype=np.float32)
    # The same memory by heads.
    heads = qkv.reshape(size, num_heads + 2 * groups, dim)
    by_head = mixed.reshape(size, num_heads, dim)
    for i in range(layers):
        _rms_norm(hidden, weights.input_norm[i], eps, x)
        for p in prange(weights.qkv.shape[1]):
            _start_panel(qkv, p, weights.qkv_bias[i, p])
            _add_panel(x, weights.qkv[i], qkv, p)
        for pair in prange(size * groups):
            b, number = pair // groups, pair % groups
            at, row = (rows.cos[b], rows.sin[b], rows.ends[b]), rows.rows[b]
            cache = (rows.cache[i, 0, row, number], rows.cache[i, 1, row, number])
            _remember(heads[b, num_heads + number], heads[b, num_heads + groups + number], at, cache)
        # Later tokens of a prompt see more: from both ends inwards, so that threads share the work evenly.
        for pair in prange(size * groups):
            nth, number = pair // groups, pair % groups
            b = nth // 2 if nth % 2 == 0 else size - 1 - nth // 2
            at, row = (rows.cos[b], rows.sin[b], rows.ends[b]), rows.rows[b]
            cache = (rows.cache[i, 0, row, number], rows.cache[i, 1, row, number])
            first, last = number * shared, (number + 1) * shared
            _attend_group(heads[b, first:last], at, cache, by_head[b, first:last])
        for p in prange(weights.out.shape[1]):
            _add_panel(mixed, weights.out[i], hidden, p)
        _rms_norm(hidden, weights.post_norm[i], eps, x)
        for p in prange(weights.gate.shape[1]):
            _start_panel(gate, p, zeros)
            _start_panel(up, p, zeros)
            _add_panel(x, weights.gate[i], gate, p)
            _add_panel(x, weights.up[i], up, p)
            _gate_panel(gate, up, p)
        for p in prange(weights.down.shape[1]):
            _add_panel(gate, weights.down[i], hidden, p)
    _rms_norm(hidden, weights.norm, eps, x)
    return x


@njit(fastmath=_FAST, nogil=True, cache=True, parallel=_LOOPS_ONLY)
def _project(x, weight):
    """x (B, K) by a packed weight -> (B, columns with their padding)."""
    y, zeros = np.empty((x.shape[0], weight.shape[0] * PANEL), dtype=np.float32), np.zeros(PANEL, dtype=np.float32)
    for p in prange(weight.shape[0]):
        _start_panel(y, p, zeros)
        _add_panel(x, weight, y, p)
    return y


def _of(ndim: int, dtype: types.Type = float32) -> types.Array:
    return types.Array(dtype, ndim, "C")


_WEIGHTS = types.NamedTuple((_of(2), _of(4), _of(3), _of(4), _of(2), _of(4), _of(4), _of(4), _of(1)), Weights)
_ROWS = types.NamedTuple((_of(2), _of(2), _of(1, int64), _of(1, int64), _of(6)), Rows)


def load() -> None:
    """Compile, or take what was compiled before, and try it.

    Raises what numba raises: no threads that torch can share, no processor that it knows; without a folder to keep the
    code in, the import of this module has raised before.
    """
    config.THREADING_LAYER = "omp"  # torch's own threads serve it too, and callers may come from any thread
    _step.compile((_of(2), _WEIGHTS, _ROWS, int64, float32))
    _project.compile((_of(2), _of(3)))
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
