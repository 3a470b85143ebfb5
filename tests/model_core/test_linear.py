"""oneDNN's products are torch's, over the same weights."""

from __future__ import annotations

import pytest
import torch

from model_core import linear
from model_core.linear import PackedProduct, PlainProduct, can_use_onednn

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_use_onednn(torch.zeros(2, 2, dtype=dtype))]
needs_onednn = pytest.mark.skipif(not DTYPES, reason="this torch has no oneDNN products")


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_agree(rows: int, dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x, bias, total = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (rows, 64), (96,), (rows, 96))
    )
    atol = 1e-4 if dtype == torch.float32 else 0.3
    with torch.inference_mode():
        packed, plain = (kind(weight, bias if has_bias else None) for kind in (PackedProduct, PlainProduct))
        expected = x.double() @ weight.double().t() + (bias.double() if has_bias else 0.0)
        for product in (packed, plain):
            assert torch.allclose(product(x).double(), expected, atol=atol)
        packed, plain = PackedProduct(weight), PlainProduct(weight)
        expected = total.double() + x.double() @ weight.double().t()
        for product in (packed, plain):
            assert torch.allclose(product.added_to(total, x).double(), expected, atol=atol)


def test_a_processor_without_a_types_units_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without units for bfloat16 oneDNN raised while a bfloat16 model was loaded: it could not be served."""

    def refuse(*_: object) -> None:
        raise RuntimeError("bf16 path needs the cpu support")

    linear._has_product.cache_clear()
    monkeypatch.setattr(linear.PackedProduct, "__init__", refuse)
    try:
        assert not can_use_onednn(torch.zeros(2, 2, dtype=torch.bfloat16))
    finally:
        linear._has_product.cache_clear()
