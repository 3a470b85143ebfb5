"""Muon for matrices inside blocks, AdamW for everything else, behind one optimizer's face.

In: parameter groups, some marked `is_matrix`; out: steps. Muon (Jordan et al. 2024; scaled to AdamW's step size as in
2502.16982, section 2.2) makes a matrix's momentum orthogonal, in bfloat16 where the machine has fast units for it: a
processor without any emulates such products at a twentieth of float32's speed and less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Where matrices lie that act on tokens within a layer; embeddings, heads and projectors are AdamW's.
_INSIDE = (".blocks.", ".layers.", ".layer.", ".merger.mlp.")
#: Numbers in one go; of the largest models a matrix alone.
_TURNED_AT_ONCE = 1 << 24
_COEFFICIENTS, _STEPS, _EPSILON, _MOMENTUM = (3.4445, -4.775, 2.0315), 5, 1e-7, 0.95


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Is this one for Muon?"""
    return parameter.ndim == 2 and any(key in name for key in _INSIDE)


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on an accelerator and on a processor whose units for it are fast, else float32.

    AVX-512's own bfloat16 products are not everywhere fast: on a Xeon of a generation with AMX whose virtual machine
    hides AMX they took twice float32's time (163 and 326 GFLOP/s on two cores), on an EPYC they were the faster. The
    former are told by AVX-512's float16, which came with AMX. By flags and not by a clock: the same machine must choose
    alike whenever a run goes on."""
    if device.type != "cpu":
        return torch.bfloat16
    has = torch.cpu.get_capabilities()
    is_fast = has.get("amx_bf16") or (has.get("avx512_bf16") and not has.get("avx512_fp16"))
    return torch.bfloat16 if is_fast else torch.float32


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
        """Matrices of one shape are turned in one go: a small one's products are too short to be worth a call each."""
        by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault((p.shape, p.device), []).append(p)
        for alike in by_shape.values():
            size = max(1, _TURNED_AT_ONCE // alike[0].numel())
            for begin in range(0, len(alike), size):
                self._step_alike(alike[begin : begin + size], group["lr"], group["weight_decay"])

    def _step_alike(self, parameters: list[Tensor], rate: float, decay: float) -> None:
        updates = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            momentum = state["momentum_buffer"].lerp_(p.grad, 1 - _MOMENTUM)
            updates.append(p.grad.lerp(momentum, _MOMENTUM).to(working_dtype(p.device)))
        turned = orthogonal(torch.stack(updates), _COEFFICIENTS, _STEPS, _EPSILON)
        for p, update in zip(parameters, turned, strict=True):
            p.mul_(1 - rate * decay)
            p.add_(update.to(p.dtype), alpha=-rate * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """(n, rows, columns): of each the nearest matrix with singular values near 1, by Newton-Schulz iterations of
    degree five."""
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
