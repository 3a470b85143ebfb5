"""`gated_residual`: y = q + (E a_d) W_o P_d z_d. Qwen's tokens go around, so common_dim may be small."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model_core.fusion.base import FusionInputs, FusionOutput, FusionStrategy, expand_rows
from model_core.fusion.gated import build_gate, reset_gate
from model_core.vision_tokens import pool


class GatedResidualFusion(FusionStrategy):
    """Identity because W_o is zero; P_d is not, since two zero factors would never get a gradient."""

    has_gate = True
    has_residual = True

    def __init__(self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0) -> None:
        super().__init__(dims, common_dim, dropout)
        others = {name: dim for name, dim in dims.items() if name != "qwen"}
        self.projectors = nn.ModuleDict({name: nn.Linear(dim, common_dim) for name, dim in others.items()})
        self.output_projector = nn.Linear(common_dim, self.llm_dim, bias=False)
        self.gate = build_gate(self.llm_dim + common_dim * len(others), len(dims))

    def reset_parameters(self) -> None:
        for module in (*self.norms.values(), *self.projectors.values()):
            module.reset_parameters()
        nn.init.zeros_(self.output_projector.weight)
        reset_gate(self.gate)
        self.means.reset()

    def silent_parameters(self) -> list[Tensor]:
        return [self.output_projector.weight]

    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        q = inputs.z["qwen"]
        projected = {name: proj(inputs.z[name]) for name, proj in self.projectors.items()}
        pooled = torch.cat([pool(x, inputs.lengths) for x in (q, *projected.values())], dim=-1)
        weights = self.gate(pooled).float().softmax(dim=-1)  # (I, E)
        scaled, shares, y = weights * len(self.encoder_names), {"qwen": q}, q
        for name, tokens in projected.items():
            scale = expand_rows(scaled[:, self.encoder_names.index(name)], inputs.lengths)
            shares[name] = self.output_projector(self.dropout((scale * tokens).to(q.dtype)))
            y = y + shares[name]
        return FusionOutput(y, weights, q, shares if inputs.want_contributions else None)
