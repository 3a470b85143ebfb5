"""`gated`: the README's picture. y = W_o(sum_e (E a_e) P_e z_e), a = softmax(gate(pooled)) per image.

E a_e is formed first, one fp32 scalar an image, so that equal weights multiply by exactly 1.
`static` is the same with fixed weights; `token_gated` decides per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model_core.fusion.base import FusionInputs, FusionOutput, FusionStrategy, expand_rows, identity_
from model_core.vision_tokens import pool

GATE_HIDDEN_MAX = 512


def build_gate(in_dim: int, num_encoders: int) -> nn.Sequential:
    """Two layers; the last starts at zero, so that a fresh gate gives every encoder the same weight."""
    hidden = min(in_dim, GATE_HIDDEN_MAX)
    return nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, num_encoders))


def reset_gate(gate: nn.Sequential) -> None:
    for layer in gate:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    nn.init.zeros_(gate[-1].weight)
    nn.init.zeros_(gate[-1].bias)


class WeightedFusion(FusionStrategy):
    """What `gated`, `token_gated` and `static` share: projectors, a weighted sum, one output projector."""

    has_gate = True

    def __init__(self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0) -> None:
        super().__init__(dims, common_dim, dropout)
        self.projectors = nn.ModuleDict({name: nn.Linear(dim, common_dim) for name, dim in dims.items()})
        self.output_projector = nn.Linear(common_dim, self.llm_dim)

    def reset_parameters(self) -> None:
        for norm in self.norms.values():
            norm.reset_parameters()
        for name, projector in self.projectors.items():
            if name == "qwen":
                identity_(projector.weight)
            else:
                nn.init.zeros_(projector.weight)
            nn.init.zeros_(projector.bias)
        identity_(self.output_projector.weight)
        nn.init.zeros_(self.output_projector.bias)
        self.means.reset()

    def silent_parameters(self) -> list[Tensor]:
        return [p for name, proj in self.projectors.items() if name != "qwen" for p in (proj.weight, proj.bias)]

    def combine(
        self, projected: dict[str, Tensor], scales: dict[str, Tensor], want: bool
    ) -> tuple[Tensor, dict | None]:
        """Sum scale_e * P_e z_e and send it through the output projector.

        scales: (S, 1) float32 by encoder, already E a_e.
        """
        dtype = self.output_projector.weight.dtype
        terms = {name: (scales[name] * p).to(dtype) for name, p in projected.items()}
        total = self.dropout(torch.stack(list(terms.values())).sum(0) if len(terms) > 2 else sum(terms.values()))
        shares = None
        if want:
            shares = {name: nn.functional.linear(t, self.output_projector.weight) for name, t in terms.items()}
        return self.output_projector(total), shares


class GatedFusion(WeightedFusion):
    """The default. The gate reads each image's mean projected tokens; text and neighbours never."""

    def __init__(self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0) -> None:
        super().__init__(dims, common_dim, dropout)
        self.gate = build_gate(common_dim * len(dims), len(dims))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        reset_gate(self.gate)

    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        projected = {name: self.projectors[name](z) for name, z in inputs.z.items()}  # (S, C) each
        pooled = torch.cat([pool(p, inputs.lengths) for p in projected.values()], dim=-1)  # (I, E*C)
        weights = self.gate(pooled).float().softmax(dim=-1)  # (I, E)
        scaled = weights * len(projected)
        scales = {name: expand_rows(scaled[:, e], inputs.lengths) for e, name in enumerate(projected)}
        tokens, shares = self.combine(projected, scales, inputs.want_contributions)
        return FusionOutput(tokens, weights, inputs.z["qwen"], shares)


class TokenGatedFusion(WeightedFusion):
    """`token_gated`: the gate decides for every cell; the reported weight is the image's mean."""

    def __init__(self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0) -> None:
        super().__init__(dims, common_dim, dropout)
        self.gate = build_gate(common_dim * len(dims), len(dims))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        reset_gate(self.gate)

    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        projected = {name: self.projectors[name](z) for name, z in inputs.z.items()}
        weights = self.gate(torch.cat(list(projected.values()), dim=-1)).float().softmax(dim=-1)  # (S, E)
        scaled = weights * len(projected)
        scales = {name: scaled[:, e, None] for e, name in enumerate(projected)}
        tokens, shares = self.combine(projected, scales, inputs.want_contributions)
        return FusionOutput(tokens, pool(weights, inputs.lengths), inputs.z["qwen"], shares)
