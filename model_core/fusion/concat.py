"""`concat`: y = q + W_2 GELU(W_1 [q; x]), channel concatenation as in Prismatic (2402.07865) and Eagle (2408.15998),
with a residual so that it is an identity while W_2 is zero. It has no gate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model_core.fusion.base import FusionInputs, FusionOutput, FusionStrategy


class ConcatFusion(FusionStrategy):
    """See the module. Without a gate there are no weights, and no exact contribution of either encoder."""

    has_residual = True

    def __init__(self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0) -> None:
        super().__init__(dims, common_dim, dropout)
        self.projectors = nn.ModuleDict({"joint": nn.Linear(sum(dims.values()), common_dim)})
        self.output_projector = nn.Linear(common_dim, self.llm_dim, bias=False)

    def reset_parameters(self) -> None:
        for module in (*self.norms.values(), *self.projectors.values()):
            module.reset_parameters()
        nn.init.zeros_(self.output_projector.weight)
        self.means.reset()

    def silent_parameters(self) -> list[Tensor]:
        return [self.output_projector.weight]

    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        q = inputs.z["qwen"]
        hidden = nn.functional.gelu(self.projectors["joint"](torch.cat(list(inputs.z.values()), dim=-1)))
        update = self.output_projector(self.dropout(hidden))
        # The update mixes both encoders in one nonlinearity: no exact share of either exists.
        return FusionOutput(q + update, None, q)
