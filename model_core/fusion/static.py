"""`static`: as `gated`, with weights that are fixed in the configuration (default: equal)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from model_core.errors import ConfigError
from model_core.fusion.base import FusionInputs, FusionOutput
from model_core.fusion.gated import WeightedFusion


class StaticFusion(WeightedFusion):
    """Equal weights are an identity at birth; others are not, and scale Qwen's tokens by E a_qwen."""

    def __init__(
        self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(dims, common_dim, dropout)
        chosen = list(weights) if weights is not None else [1.0 / len(dims)] * len(dims)
        if len(chosen) != len(dims) or min(chosen) < 0 or abs(sum(chosen) - 1.0) > 1e-6:
            raise ConfigError(
                "static_weights don't fit", value=chosen, allowed=f"{len(dims)} numbers from 0 to 1 that sum to 1",
                fix="Give each encoder its share, or leave them out for equal ones",
            )  # fmt: skip
        self.static_weights = tuple(chosen)

    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        z = inputs.z["qwen"]
        projected = {name: self.projectors[name](tokens) for name, tokens in inputs.z.items()}
        weights = torch.tensor(self.static_weights, dtype=torch.float32, device=z.device)
        scales = {name: weights[e] * len(projected) for e, name in enumerate(projected)}
        tokens, shares = self.combine(projected, scales, inputs.want_contributions)
        return FusionOutput(tokens, weights.expand(len(inputs.grids), -1), z, shares)
