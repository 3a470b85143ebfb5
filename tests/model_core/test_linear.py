"""oneDNN's products are torch's, over the same weights."""

from __future__ import annotations

import pytest
import torch

from model_core.linear import PackedProduct, PlainProduct, can_use_onednn

needs_onednn = pytest.mark.skipif(not can_use_onednn(torch.zeros(2, 2)), reason="this torch has no oneDNN products")


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
