"""Muon's precision follows the machine, it is torch's but for that, and AdamW keeps everything that is no matrix."""

from __future__ import annotations

import pytest
import torch

from model_core.training import muon
from model_core.training.muon import MuonAdamW, is_block_matrix, orthogonal, working_dtype


@pytest.mark.parametrize(
    ("units", "expected"),
    [({}, torch.float32), ({"avx512_bf16": False, "avx2": True}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_a_processor_without_units_for_bfloat16_works_in_float32(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], expected: torch.dtype
) -> None:
    """There a step for letters took 14 seconds with Muon in bfloat16 and 2 with it in float32."""
    monkeypatch.setattr(muon.torch.cpu, "get_capabilities", lambda: units)
    assert working_dtype(torch.device("cpu")) == expected
    assert working_dtype(torch.device("cuda")) == torch.bfloat16


def _stepped(parameters: list[torch.nn.Parameter], matrices: list[torch.nn.Parameter]) -> MuonAdamW:
    groups = [{"params": parameters, "is_matrix": False}, {"params": matrices, "is_matrix": True}]
    return MuonAdamW([group for group in groups if group["params"]], lr=1e-2, weight_decay=0.05)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_in_bfloat16_it_steps_as_torchs_muon_and_leaves_the_rest_to_adamw(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(muon, "working_dtype", lambda _: torch.bfloat16)
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    ours, theirs, plain, adamw = (torch.nn.Parameter(start.clone()) for _ in range(4))
    one = _stepped([plain], [ours])
    other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    third = torch.optim.AdamW([adamw], lr=1e-2, weight_decay=0.05)
    for gradient in gradients:
        for parameter in (ours, theirs, plain, adamw):
            parameter.grad = gradient.clone()
        for optimizer in (one, other, third):
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert torch.equal(one.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"])
    assert torch.equal(plain, adamw)
    assert len(one.param_groups) == 2, "a step leaves the groups as they were"
    assert not torch.equal(ours, start)


def test_the_orthogonal_step_lets_no_direction_dominate() -> None:
    torch.manual_seed(0)
    stretched = torch.randn(32, 16) * torch.logspace(0, 2, 16)
    values = torch.linalg.svdvals(orthogonal(stretched[None], (3.4445, -4.775, 2.0315), 5, 1e-7)[0])
    assert values.max() < 1.3
    assert values.max() / values.min() < 0.2 * torch.linalg.cond(stretched)


@pytest.mark.parametrize("at_once", [1 << 24, 300])
def test_matrices_of_one_shape_step_together_as_each_alone(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Three of (16, 8), all at once or two and one; another shape and one without a gradient between them."""
    monkeypatch.setattr(muon, "_TURNED_AT_ONCE", at_once)
    monkeypatch.setattr(muon, "working_dtype", lambda _: torch.float32)
    torch.manual_seed(0)
    shapes = [(16, 8), (4, 4), (16, 8), (16, 8), (16, 8)]
    starts, gradients = ([torch.randn(shape) * 10.0**n for n, shape in enumerate(shapes)] for _ in range(2))
    together = [torch.nn.Parameter(start.clone()) for start in starts]
    alone = [torch.nn.Parameter(start.clone()) for start in starts]
    for number in (0, 1, 3, 4):
        together[number].grad, alone[number].grad = gradients[number].clone(), gradients[number].clone()
    _stepped([], together).step()
    for parameter in alone:
        _stepped([], [parameter]).step()
    for one, other, start in zip(together, alone, starts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert torch.equal(one, start) == (one.grad is None)


def test_a_matrix_without_a_gradient_stays() -> None:
    still = torch.nn.Parameter(torch.ones(4, 4))
    _stepped([], [still]).step()
    assert torch.equal(still, torch.ones(4, 4))


def test_embeddings_and_projectors_are_no_matrices_of_blocks() -> None:
    matrix, vector = torch.ones(2, 2), torch.ones(2)
    assert is_block_matrix("model.language_model.layers.0.mlp.up_proj.weight", matrix)
    assert is_block_matrix("model.visual.merger.mlp.0.weight", matrix)
    assert not is_block_matrix("model.language_model.layers.0.input_layernorm.weight", vector)
    assert not is_block_matrix("model.language_model.embed_tokens.weight", matrix)
    assert not is_block_matrix("model.fusion.projectors.dinov2.weight", matrix)
