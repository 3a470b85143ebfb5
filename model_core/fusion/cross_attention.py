"""`cross_attention`: each of Qwen's cells attends to its own DINOv2 patches and a halo around them.

A spatially local aggregator in the manner of Cambrian-1's SVA (2406.16860, section 3.2): the query is
the cell, keys and values are the (m + 2 halo)^2 patches of the same frame that cover it. Residual;
an identity while the output projector is zero. It has no gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.fusion.base import FusionInputs, FusionOutput, FusionStrategy

HALO = 1


class CrossAttentionFusion(FusionStrategy):
    """See the module. A cell at the border attends to the patches of its window that lie in the picture."""

    has_residual = True

    def __init__(self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0, merge_size: int = 2) -> None:
        super().__init__(dims, common_dim, dropout)
        (self.source,) = (name for name in dims if name != "qwen")
        self.merge_size = merge_size
        self.window = merge_size + 2 * HALO
        patch_dim = dims[self.source] // merge_size**2
        self.num_heads = math.gcd(common_dim, 8)
        self.projectors = nn.ModuleDict(
            {
                "query": nn.Linear(self.llm_dim, common_dim),
                "key": nn.Linear(patch_dim, common_dim),
                "value": nn.Linear(patch_dim, common_dim),
            }
        )
        self.query_norm = nn.LayerNorm(self.llm_dim)
        self.position_bias = nn.Parameter(torch.zeros(self.num_heads, self.window**2))
        self.output_projector = nn.Linear(common_dim, self.llm_dim, bias=False)

    def reset_parameters(self) -> None:
        for module in (*self.norms.values(), *self.projectors.values(), self.query_norm):
            module.reset_parameters()
        nn.init.zeros_(self.position_bias)
        nn.init.zeros_(self.output_projector.weight)
        self.means.reset()

    def silent_parameters(self) -> list[Tensor]:
        return [self.output_projector.weight]

    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        q = inputs.z["qwen"]
        queries = self.projectors["query"](self.query_norm(q)).split(inputs.lengths)
        sources = inputs.z[self.source].split(inputs.lengths)
        updates = [self._image(q_i, x_i, grid) for q_i, x_i, grid in zip(queries, sources, inputs.grids, strict=True)]
        update = self.output_projector(self.dropout(torch.cat(updates)))
        return FusionOutput(
            q + update, None, q, {"qwen": q, self.source: update} if inputs.want_contributions else None
        )

    def _image(self, query: Tensor, cells: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """One image: query (N, C), cells (N, m^2*d) -> (N, C)."""
        (t, h, w), m, heads = grid, self.merge_size, self.num_heads
        patches = cells.view(t, h, w, m, m, -1).permute(0, 1, 3, 2, 4, 5).reshape(t, h * m, w * m, -1)
        keys, values = self._windows(self.projectors["key"](patches)), self._windows(self.projectors["value"](patches))
        inside = self._windows(patches.new_ones(t, h * m, w * m, 1))[..., 0] > 0  # (N, window^2)
        query = query.view(-1, heads, 1, query.shape[-1] // heads)
        keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (keys, values))  # (N, H, P, dh)
        bias = self.position_bias.to(query.dtype)[None, :, None].masked_fill(~inside[:, None, None], float("-inf"))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias).flatten(1)

    def _windows(self, x: Tensor) -> Tensor:
        """(t, H, W, C) patches -> (t*h*w cells, window^2, C), zero-padded at the border."""
        padded = F.pad(x, (0, 0, HALO, HALO, HALO, HALO))
        tiles = padded.unfold(1, self.window, self.merge_size).unfold(2, self.window, self.merge_size)
        return tiles.permute(0, 1, 2, 4, 5, 3).reshape(-1, self.window**2, x.shape[-1])
