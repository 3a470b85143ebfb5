"""The build's precision follows the machine, and Muon is torch's but for that."""

from __future__ import annotations

import pytest
import torch

from model_core.demo import precision
from model_core.demo.precision import Muon, orthogonal, working_dtype


@pytest.mark.parametrize(
    ("units", "expected"),
    [({}, torch.float32), ({"avx512_bf16": False, "avx2": True}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_a_processor_without_units_for_bfloat16_works_in_float32(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], expected: torch.dtype
) -> None:
    """There a step for letters took 14 seconds with Muon in bfloat16 and 2 with it in float32."""
    monkeypatch.setattr(precision.torch.cpu, "get_capabilities", lambda: units)
    assert working_dtype(torch.device("cpu")) == expected
    assert working_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_in_bfloat16_it_steps_as_torchs_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = Muon([ours], 1e-2, weight_decay=0.05, dtype=torch.bfloat16)
    other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert torch.equal(one.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"])
    assert not torch.equal(ours, start)


def test_the_orthogonal_step_lets_no_direction_dominate() -> None:
    torch.manual_seed(0)
    stretched = torch.randn(32, 16) * torch.logspace(0, 2, 16)
    values = torch.linalg.svdvals(orthogonal(stretched, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert values.max() < 1.3
    assert values.max() / values.min() < 0.2 * torch.linalg.cond(stretched)


def test_a_matrix_without_a_gradient_stays() -> None:
    still = torch.nn.Parameter(torch.ones(4, 4))
    Muon([still], 1e-2, weight_decay=0.05, dtype=torch.float32).step()
    assert torch.equal(still, torch.ones(4, 4))
