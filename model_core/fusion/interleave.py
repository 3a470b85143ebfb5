"""`interleave`: DINOv2's token beside Qwen's, same rotary position, as in MMVP's Interleaved-MoF (2401.06209, 5.3).

NOT an identity at birth: the language model sees twice as many image tokens. It has no gate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model_core.fusion.base import FusionInputs, FusionOutput, FusionStrategy


class InterleaveFusion(FusionStrategy):
    """See the module. Tokens come as q_0, d_0, q_1, d_1, ...: two a cell."""

    is_identity_at_birth = False
    has_residual = True
    tokens_per_cell = 2

    def __init__(self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0) -> None:
        super().__init__(dims, common_dim, dropout)
        (self.source,) = (name for name in dims if name != "qwen")
        self.projectors = nn.ModuleDict({self.source: nn.Linear(dims[self.source], common_dim)})
        self.output_projector = nn.Linear(common_dim, self.llm_dim)

    def reset_parameters(self) -> None:
        for module in (*self.norms.values(), *self.projectors.values(), self.output_projector):
            module.reset_parameters()
        self.means.reset()

    def silent_parameters(self) -> list[Tensor]:
        return []

    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        q = inputs.z["qwen"]
        other = self.output_projector(
            self.dropout(nn.functional.gelu(self.projectors[self.source](inputs.z[self.source])))
        )
        tokens = torch.stack([q, other.to(q.dtype)], dim=1).flatten(0, 1)  # q_0, d_0, q_1, d_1, ...
        return FusionOutput(tokens, None, q)
