"""Which precision the demo's build multiplies in, and Muon in that precision.

In: a device. bfloat16 where there are units for it; on a processor without them its products are emulated and ran at a
twentieth of float32's speed and less. torch's Muon makes a gradient orthogonal in bfloat16 whatever the machine, which
there was two thirds of a step whose other products were in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BF16_UNITS = ("avx512_bf16", "amx_bf16")


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on an accelerator and on a processor that has units for it, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(has.get(name) for name in _BF16_UNITS) else torch.float32


class Muon(torch.optim.Muon):
    """torch's Muon, state and all, but for the precision of the orthogonal step. One learning rate scale: AdamW's."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch gives it
        """The build's one way to call it: gradients are there, and a matrix without one stays."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                turned = orthogonal(update.to(self.dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
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
