"""Muon for matrices inside blocks, AdamW for everything else, behind one optimizer's face.

In: parameter groups, some marked `is_matrix`; out: steps. Muon (Jordan et al. 2024; scaled to AdamW's step size as in
2502.16982, section 2.2) makes a matrix's momentum orthogonal, in bfloat16 where the machine has units for it: a
processor without them emulates such products at a twentieth of float32's speed and less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BF16_UNITS = ("avx512_bf16", "amx_bf16")
#: Where matrices lie that act on tokens within a layer; embeddings, heads and projectors are AdamW's.
_INSIDE = (".blocks.", ".layers.", ".layer.", ".merger.mlp.")
_COEFFICIENTS, _STEPS, _EPSILON, _MOMENTUM = (3.4445, -4.775, 2.0315), 5, 1e-7, 0.95


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Is this one for Muon?"""
    return parameter.ndim == 2 and any(key in name for key in _INSIDE)


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on an accelerator and on a processor that has units for it, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(has.get(name) for name in _BF16_UNITS) else torch.float32


class MuonAdamW(torch.optim.AdamW):
    """Groups with `is_matrix` are stepped by Muon (state: momentum_buffer), the others by AdamW."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch gives it
        """Gradients are there; a parameter without one stays as it is."""
        groups: list[dict[str, Any]] = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["is_matrix"]]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["is_matrix"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            momentum = state["momentum_buffer"].lerp_(p.grad, 1 - _MOMENTUM)
            update = p.grad.lerp(momentum, _MOMENTUM)
            turned = orthogonal(update.to(working_dtype(p.device)), _COEFFICIENTS, _STEPS, _EPSILON)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(turned.to(p.dtype), alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest matrix with singular values near 1, by Newton-Schulz iterations of degree five."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
