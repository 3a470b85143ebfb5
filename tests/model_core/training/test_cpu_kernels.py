"""What stands for torch's kernels in a training step on a CPU gives their results and gradients; only where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_core.training import cpu_kernels as room
from model_core.training.cpu_kernels import cpu_kernels


def _with_gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and each input's gradient, of a loss that weighs every number differently."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), leaves)]


def _close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one.float() - other.float()).norm() / other.float().norm()) < tolerance


@pytest.mark.parametrize(
    ("pixels", "weight", "bias"),
    [((2, 3, 28, 42), (8, 3, 14, 14), True), ((5, 3, 2, 14, 14), (8, 3, 2, 14, 14), False)],
    ids=["conv2d", "conv3d"],
)
def test_a_patch_projection_is_the_product_that_it_is(
    monkeypatch: pytest.MonkeyPatch, pixels: tuple[int, ...], weight: tuple[int, ...], *, bias: bool
) -> None:
    products, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: products.append(args) or linear(*args))
    torch.manual_seed(0)
    inputs = [torch.randn(pixels), torch.randn(weight), *([torch.randn(8)] if bias else [])]
    convolve: Any = F.conv2d if len(pixels) == 4 else F.conv3d

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return convolve(x, w, b, stride=weight[2:])

    with cpu_kernels():
        found = _with_gradients(run, inputs)
    assert len(products) == 1, "it was a product"
    _close(found, _with_gradients(run, inputs), 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"stride": 7}, {"stride": 14, "padding": 3}, {"stride": 14, "dilation": 2}, {"stride": 14}],
    ids=["overlapping", "padded", "dilated", "with a rest"],
)
def test_another_convolution_stays_torchs(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    pixels, weight = torch.randn(2, 3, 45, 45), torch.randn(8, 3, 14, 14)
    with cpu_kernels():
        found = F.conv2d(pixels, weight, **options)
    assert torch.equal(found, F.conv2d(pixels, weight, **options))


@pytest.mark.parametrize("kind", ["plain", "causal", "masked"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_short_attention_in_bfloat16_is_torchs_to_rounding(kind: str, groups: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 4, 40, 16)
    key, value = torch.randn(2, 3, groups, 40, 16)
    # Rows of which each sees something, as the block mask of several questions behind one picture.
    mask = (torch.rand(3, 1, 40, 40) < 0.5) | torch.eye(40, dtype=torch.bool)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, mask if kind == "masked" else None, is_causal=kind == "causal", enable_gqa=groups != 4
        )

    wanted = _with_gradients(run, [query, key, value])
    with cpu_kernels():
        found = _with_gradients(run, [x.bfloat16() for x in (query, key, value)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = _with_gradients(run, [query, key, value])
    _close(found, wanted, 0.02)
    _close(cast, wanted, 0.02)


@pytest.mark.parametrize(
    ("dtype", "tokens", "dropout"),
    [(torch.float32, 8, 0.0), (torch.bfloat16, room.MAX_TOKENS + 1, 0.0), (torch.bfloat16, 8, 0.5)],
    ids=["float32", "long", "dropout"],
)
def test_other_attention_stays_torchs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, dropout: float
) -> None:
    """Seen by the softmax that is not called; torch's kernel holds no scores."""
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *_: pytest.fail("scores were made"))
    query = torch.randn(1, 1, tokens, 8, dtype=dtype)
    with cpu_kernels():
        assert F.scaled_dot_product_attention(query, query, query, dropout_p=dropout).shape == query.shape


def test_a_float_mask_stays_torchs() -> None:
    torch.manual_seed(0)
    query, mask = torch.randn(1, 2, 6, 8).bfloat16(), torch.randn(6, 6).bfloat16()
    with cpu_kernels():
        found = F.scaled_dot_product_attention(query, query, query, mask)
    assert torch.equal(found, F.scaled_dot_product_attention(query, query, query, mask))
