"""What the compiled loops are made of gives what numpy gives."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from model_core.language.panels import PANEL, pack_columns


def test_exp_is_good_to_two_units_in_the_last_place_and_flat_beyond(kernel: SimpleNamespace) -> None:
    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    found = np.array([kernel._exp.py_func(value) for value in x])
    right = np.exp(x.astype(np.float64))
    assert (np.abs(found - right) <= 2.5 * np.spacing(right.astype(np.float32))).all()
    assert kernel._exp.py_func(np.float32(-1000)) < 1e-37
    assert np.isfinite(kernel._exp.py_func(np.float32(1000)))


@pytest.mark.parametrize("columns", [1, PANEL, 3 * PANEL + 5])
@pytest.mark.parametrize("inner", [1, 64, 127, 128, 129, 300])
def test_a_product_is_numpys_and_each_row_its_own(kernel: SimpleNamespace, inner: int, columns: int) -> None:
    """Any number of columns and rows, and inner lengths around one turn's."""
    rng = np.random.default_rng(inner)
    weight = rng.standard_normal((columns, inner), dtype=np.float32)
    packed = pack_columns(weight)
    for rows in (1, 2, 3, 8):
        x = rng.standard_normal((rows, inner), dtype=np.float32)
        found = kernel.project(x, packed, columns, num_threads=2)
        assert np.allclose(found, x.astype(np.float64) @ weight.astype(np.float64).T, atol=1e-4)
        for number in range(rows):
            alone = kernel.project(x[number : number + 1].copy(), packed, columns, num_threads=1)
            assert np.array_equal(alone[0], found[number])
