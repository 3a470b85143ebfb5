"""Norms and rotary positions of a training step on a CPU: transformers' results and gradients; nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, apply_rotary_pos_emb_vision

from model_core.encoders.segments import SegmentVisionAttention
from model_core.language.decoder import rotate
from model_core.training.cpu_passes import fewer_passes, rms_norm, rotate_patches, rotate_tokens
from tests.model_core import tiny

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def _with_gradients(run: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then each input's gradient, of a loss that weighs every number differently."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = run(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    loss = sum((out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outs)
    return [*(out.detach() for out in outs), *torch.autograd.grad(loss, leaves)]


def _close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one.float() - other.float()).norm() / other.float().norm()) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(40, 32), (3, 5, 32)])
def test_a_norm_is_transformers_and_so_is_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Qwen2_5_VLRMSNorm(32, eps=1e-3)
    inputs = [torch.randn(shape).to(dtype), torch.randn(32).to(dtype)]

    def theirs(x: Tensor, weight: Tensor) -> Any:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    found = _with_gradients(lambda x, w: rms_norm(x, w, 1e-3), inputs)
    _close(found, _with_gradients(theirs, inputs), TOLERANCE[dtype])
    assert found[0].dtype == dtype


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_a_norm_with_one_side_frozen_gives_the_other_its_gradient(frozen: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 16), torch.randn(16)
    both = _with_gradients(lambda a, b: rms_norm(a, b, 1e-6), [x, weight])
    if frozen == "input":
        one = _with_gradients(lambda b: rms_norm(x, b, 1e-6), [weight])
        assert torch.equal(one[1], both[2])
    else:
        one = _with_gradients(lambda a: rms_norm(a, weight, 1e-6), [x])
        assert torch.equal(one[1], both[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rotary_positions_are_transformers_and_so_are_their_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(9, 4, 16).to(dtype), torch.randn(9, 2, 16).to(dtype)
    # Halves of their own: the gradient must take the other half's.
    cos, sin = torch.randn(9, 16), torch.randn(9, 16)
    wanted = _with_gradients(lambda q, k: apply_rotary_pos_emb_vision(q, k, cos, sin), [query, key])
    found = _with_gradients(lambda q, k: rotate_patches(q, k, cos, sin), [query, key])
    _close(found, wanted, TOLERANCE[dtype])
    assert found[0].dtype == dtype
    wanted = _with_gradients(lambda q, k: rotate(q, k, cos[None], sin[None]), [query, key])
    _close(
        _with_gradients(lambda q, k: rotate_tokens(q, k, cos[None], sin[None]), [query, key]), wanted, TOLERANCE[dtype]
    )


def test_modules_are_as_before_afterwards_and_a_users_forward_stays() -> None:
    model = tiny.trained_model()
    norms = [m for m in model.modules() if isinstance(m, Qwen2_5_VLRMSNorm)]
    attentions = [m for m in model.modules() if isinstance(m, SegmentVisionAttention)]
    assert norms and attentions
    norms[0].forward = own = lambda x: x * 2
    with pytest.raises(RuntimeError, match="on the way"), fewer_passes(model):
        assert norms[0].forward is own
        assert all("forward" in vars(m) for m in norms) and all("rotate" in vars(m) for m in attentions)
        with fewer_passes(model):
            pass
        assert all("forward" in vars(m) for m in norms), "a second use inside takes nothing away"
        raise RuntimeError("on the way")
    assert norms[0].forward is own
    assert not any("forward" in vars(m) for m in norms[1:]) and not any("rotate" in vars(m) for m in attentions)
